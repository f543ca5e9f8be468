"""Typed access to untrusted JSON: a wrong type or a value out of range is a `ModelError`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ModelError

LARGEST = 2**31 - 1
_LARGEST_FILE = 64 * 2**20  # bytes; the largest index of shards seen is a few MB


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ModelError: the file is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ModelError(f"{path} has over {_LARGEST_FILE} bytes; it is not a model's settings")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


class Fields:
    """Settings of one JSON object; `null` counts as absent.

    Args:
        values: the object.
        where: name of the object in error messages.
        names: our name of a setting -> this family's name.
        defaults: our name -> value of an absent setting.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str = "config.json",
        names: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self.where = where
        self._names = names or {}
        self._defaults = defaults or {}

    def __contains__(self, name: str) -> bool:
        return self.values.get(self.key(name)) is not None

    def key(self, name: str) -> str:
        """Return this family's name of a setting."""
        return self._names.get(name, name)

    def has_key(self, name: str) -> bool:
        """Return whether the setting is present, `null` included."""
        return self.key(name) in self.values

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value without a check."""
        value = self.values.get(self.key(name))
        return self._defaults.get(name, default) if value is None else value

    def fail(self, name: str, expected: str) -> ModelError:
        """Return the error for a setting with an unexpected value."""
        key = self.key(name)
        shown = "missing" if self.get(name) is None else f"{self.get(name)!r:.80}"
        return ModelError(f"{key} in {self.where} is {shown}, expected {expected}")

    def integer(
        self, name: str, default: int | None = None, low: int = 1, high: int = LARGEST
    ) -> int:
        """Return an integer from `low` to `high`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"a whole number from {low} to {high}")
        return value

    def number(
        self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12
    ) -> float:
        """Return a number above `low`, up to `high`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, "a number")
        if not low < value <= high:  # a NaN is neither
            raise self.fail(name, f"a number above {low:g}, at most {high:g}")
        return float(value)

    def share(self, name: str, default: float) -> float:
        """Return a number from 0 to 1."""
        value = self.get(name, default)
        return 0.0 if value == 0 and value is not False else self.number(name, default, high=1)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.fail(name, "a string")
        return value

    def strings(self, name: str, length: int) -> list[str]:
        """Return a list of `length` strings."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(name, "a list of strings")
        if len(value) != length:
            raise ModelError(
                f"{name} in {self.where} has {len(value)} entries, expected one for each of "
                f"{length} layers"
            )
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        """Return token ids, given as an integer, a list, or not at all."""
        value = self.get(name, [])
        items = value if isinstance(value, list) else [value]
        if not all(type(item) is int and -1 <= item <= LARGEST for item in items):
            raise self.fail(name, "a token id or a list of token ids")
        return tuple(item for item in items if item >= 0)

    def table(self, name: str) -> dict[str, Any]:
        """Return a nested object; empty when absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.fail(name, "a JSON object")
        return value

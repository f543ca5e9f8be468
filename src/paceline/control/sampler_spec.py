"""How a request is sampled: one validated object for the CLI, Python and a server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite

from paceline.control.base import ControlMethod, chain
from paceline.errors import MethodError, RequestError, unknown
from paceline.registry import controls


@dataclass(frozen=True)
class SamplerSpec:
    """Controls in the order in which they are applied, and the temperature if one is given.

    Attributes:
        temperature: 0 is greedy; None leaves it to the checkpoint.
        methods: each kind once.
    """

    temperature: float | None = None
    methods: tuple[ControlMethod, ...] = ()

    @classmethod
    def parse(cls, text: str) -> SamplerSpec:
        """`NAME=VALUE,...`, VALUE being the first setting; `NAME.SETTING=VALUE` for the others.

        Raises:
            MethodError: unknown control or setting, or one given twice.
            RequestError: a value out of range, or not a number.
        """
        found: dict[str, object] = {}
        for item in filter(None, map(str.strip, text.split(","))):
            name, equals, value = item.partition("=")
            if not equals:
                raise MethodError(f"{item!r} in the sampler has no value; write {item}=VALUE")
            if name in found:
                raise MethodError(f"{name} is given twice in the sampler; give one")
            found[name] = value
        return cls.of(found)

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> SamplerSpec:
        """The same from a mapping, as `{"min_p": 0.05, "dry": 0.8, "dry.base": 2}`.

        Lists are given as such: `{"bad_words": ["damn", 13], "logit_bias": {13: -5}}`.

        Raises:
            MethodError, RequestError: as `parse`.
        """
        temperature: float | None = None
        values: dict[str, list[str]] = {}
        for key, value in settings.items():
            if key == "temperature":
                temperature = number(key, _text(value))
                continue
            name, dot, setting = key.partition(".")
            kind = controls.methods().get(name)
            if kind is None:
                raise MethodError(unknown("control", name, controls.methods()))
            first = fields(kind)[0].name
            text = f"{setting if dot else first}={_text(value)}"
            values.setdefault(name, []).append(text)
        return cls(
            temperature, tuple(controls.parse(f"{n}:{','.join(v)}") for n, v in values.items())
        )

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}, expected 0 or more")
        chain(self.methods)


def number(name: str, text: str) -> float:
    """A finite number.

    Raises:
        RequestError: `text` is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise RequestError(f"{name} is {text.strip()!r}, expected a number")
    return value


def _text(value: object) -> str:
    """A value as `--sampler` would have it."""
    if isinstance(value, Mapping):
        return ";".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ";".join(_item(item) for item in value)
    return str(value)


def _item(item: object) -> str:
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace(",", "\\u002c")
    if isinstance(item, Iterable):
        return " ".join(map(str, item))
    return str(item)

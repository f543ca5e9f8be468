"""Writes flat TOML documents, which the standard library only reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def to_toml(document: Mapping[str, Any]) -> str:
    """Return a document as TOML: values first, then tables, then lists of tables.

    Args:
        document: texts, numbers, booleans and lists of these; mappings of such values; and lists of
            such mappings. Values that are None are left out.

    Raises:
        ValueError: a number is not finite.
    """
    parts = [_values({k: v for k, v in document.items() if not _is_table(v)})]
    for name, value in document.items():
        if isinstance(value, Mapping):
            parts.append(f"[{_key(name)}]\n{_values(value)}")
        elif _is_table(value):
            parts += [f"[[{_key(name)}]]\n{_values(each)}" for each in value]
    return "\n".join(parts)


def _is_table(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _values(values: Mapping[str, Any]) -> str:
    lines = [f"{_key(k)} = {_value(v)}" for k, v in values.items() if v is not None]
    return "".join(f"{line}\n" for line in lines)


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isascii() and plain.isalnum() else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number that a plan can hold")
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_value, value))}]"
    raise ValueError(f"{value!r} cannot be written as TOML")


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

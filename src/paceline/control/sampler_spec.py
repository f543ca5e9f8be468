"""Parsing of sampler settings, shared by CLI, Python and server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite

from paceline.control.base import ControlMethod, chain
from paceline.errors import MethodError, RequestError, unknown
from paceline.method_spec import MethodSpec, members, parse_specs
from paceline.registry import controls

_LONG = re.compile(r"\s*\w+\s*(?:[:+]|$)")


@dataclass(frozen=True)
class SamplerSpec:
    """Sampler settings: controls in the order in which they are applied, and the temperature.

    Attributes:
        temperature: 0 is greedy; None: the checkpoint's default.
        methods: at most one of each kind.
    """

    temperature: float | None = None
    methods: tuple[ControlMethod, ...] = ()

    @classmethod
    def parse(cls, text: str) -> SamplerSpec:
        """Parse `NAME:key=value,...+NAME:key=value`, or the short form `NAME=VALUE,...`.

        In the short form VALUE is the first setting, and `NAME.SETTING=VALUE` gives the others.

        Raises:
            MethodError: unknown control or setting, or one given twice.
            RequestError: a value out of range, or not a number.
        """
        if _LONG.match(text):
            return cls._read(parse_specs(text, [*controls.methods(), "temperature"]))
        settings: dict[str, object] = {}
        for item in members("the sampler", text, ","):
            name, equals, value = item.partition("=")
            if not equals:
                raise MethodError(f"{item!r} in the sampler has no value; write {item}=VALUE")
            if name in settings:
                raise MethodError(f"{name} is given twice in the sampler; give one")
            settings[name] = value
        return cls.of(settings)

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> SamplerSpec:
        """Build it from a mapping, as `{"min_p": 0.05, "dry": 0.8, "dry.base": 2}`.

        Values may be lists and mappings: `{"bad_words": ["damn", 13], "logit_bias": {13: -5}}`.

        Raises:
            MethodError, RequestError: as `parse`.
        """
        specs: dict[str, dict[str, str]] = {}
        for key, value in settings.items():
            name, dot, setting = key.partition(".")
            kind = controls.methods().get(name)
            if kind is None:
                raise MethodError(unknown("control", name, controls.visible()))
            given = specs.setdefault(name, {})
            setting = setting if dot else fields(kind)[0].name
            if setting in given:
                raise MethodError(f"{name}.{setting} is given twice in the sampler; give one")
            given[setting] = _text(key, value)
        return cls._read([MethodSpec(name, given) for name, given in specs.items()])

    @classmethod
    def _read(cls, specs: Iterable[MethodSpec]) -> SamplerSpec:
        temperature: float | None = None
        methods = []
        for spec in specs:
            if spec.name == "temperature":
                if list(spec.settings) != ["value"] or temperature is not None:
                    raise MethodError("temperature has one setting; write temperature:value=NUMBER")
                temperature = number("temperature", spec.settings["value"])
            else:
                methods.append(controls.build(spec))
        return cls(temperature, tuple(methods))

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}, expected 0 or more")
        chain(self.methods)


def number(name: str, text: str) -> float:
    """Convert text to a finite number.

    Raises:
        RequestError: `text` is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise RequestError(f"{name} is {text.strip()!r}, expected a number")
    return value


def _text(name: str, value: object) -> str:
    """Return a value in the syntax of `--sampler`.

    Raises:
        MethodError: it is a list with an empty member.
    """
    if isinstance(value, Mapping):
        return ";".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        items = [_item(item) for item in value]
        if "" in items or '""' in items:
            raise MethodError(f"{name} has an empty member; leave it out")
        return ";".join(items)
    return str(value)


def _item(item: object) -> str:
    if isinstance(item, str):
        return json.dumps(item, ensure_ascii=False).replace(",", "\\u002c")
    if isinstance(item, Iterable):
        return " ".join(map(str, item))
    return str(item)

"""Where methods are found by name. A decorator registers them; other packages use entry points.

A method is a frozen dataclass; its fields are its settings. `recycle:tree=paper,k=8` names one
with settings. The entry-point groups are `paceline.drafters`, `paceline.control`,
`paceline.control.guides`, `paceline.decoding.strategies` and `paceline.watermarks`.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from paceline.core import Exactness
from paceline.errors import MethodError, unknown


class Registry:
    """The methods of one family.

    Args:
        family: singular, as users read it, e.g. `drafter`.
        package: where our own methods live, one module each, e.g. `paceline.drafters`.
    """

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self.package = package
        self._methods: dict[str, type[Any]] = {}
        self._loaded = False

    def register(
        self, name: str, exactness: Exactness = Exactness.EXACT, hidden: bool = False
    ) -> Callable[[type[Any]], type[Any]]:
        """Register a frozen dataclass under `name`. Hidden ones are not part of `all`."""

        def decorate(method: type[Any]) -> type[Any]:
            if name in self._methods:
                raise MethodError(
                    f"two methods ({self.family}) are called {name!r}; rename one of them"
                )
            method.name, method.exactness, method.hidden = name, exactness, hidden
            self._methods[name] = method
            return method

        return decorate

    def methods(self) -> dict[str, type[Any]]:
        """Every registered method by name, ours first."""
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for entry in entry_points(group=self.package):
                entry.load()
        return self._methods

    def parse(self, text: str) -> Any:
        """The method that `NAME[:key=value,...]` names, with its settings.

        Raises:
            MethodError: unknown name or setting, a value of the wrong type, or a required setting
                is missing.
        """
        name, _, settings = text.partition(":")
        method = self.methods().get(name)
        if method is None:
            raise MethodError(unknown(self.family, name, self.methods()))
        fields = {f.name: f for f in dataclasses.fields(method)}
        hints = get_type_hints(method)
        values: dict[str, Any] = {}
        for item in filter(None, settings.split(",")):
            key, equals, value = item.partition("=")
            if key not in fields:
                raise MethodError(unknown(f"setting of {name}", key, fields))
            if not equals:
                raise MethodError(f"{name}:{item} has no value; write {key}=VALUE")
            values[key] = _convert(f"{name}:{key}", value, hints[key])
        missing = [key for key in required(method) if key not in values]
        if missing:
            raise MethodError(f"{name} needs {missing[0]}; write {name}:{missing[0]}=VALUE")
        return method(**values)

    def single(self, name: str, value: object) -> Any:
        """The method `name` with its first setting: `single("top_k", 40)`.

        Raises:
            MethodError: as `parse`.
        """
        method = self.methods().get(name)
        if method is None:
            raise MethodError(unknown(self.family, name, self.methods()))
        return self.parse(f"{name}:{dataclasses.fields(method)[0].name}={value}")


def required(method: type[Any]) -> list[str]:
    """The settings of a method that have no default. Without them it is not part of `all`."""
    return [
        f.name
        for f in dataclasses.fields(method)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def _convert(where: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise MethodError(f"{where} is {text!r}, expected true or false")
    if kind not in (int, float, str):
        raise MethodError(f"{where} cannot be given as text; set it from Python")
    try:
        return kind(text)
    except ValueError:
        raise MethodError(f"{where} is {text!r}, expected {kind.__name__}") from None


drafters = Registry("drafter", "paceline.drafters")
controls = Registry("control", "paceline.control")
strategies = Registry("strategy", "paceline.decoding.strategies")
guides = Registry("guide", "paceline.control.guides")
watermarks = Registry("watermark", "paceline.watermarks")

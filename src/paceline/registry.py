"""Where methods are found by name. A decorator registers them; other packages use entry points.

A method is a frozen dataclass; its fields are its settings. `recycle:k=8,keep=0.6` names one with
settings; `method_spec` has the grammar. The entry-point group of a family is the name of its
package, e.g. `paceline.drafters` or `paceline.control.guides`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pkgutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.errors import MethodError, unknown
from paceline.method_spec import MethodSpec, parse_spec, parse_specs


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a method comes from.

    Attributes:
        authors: e.g. `Luo et al.`; empty for methods of Paceline's own.
        title: of the paper, the program or the documentation.
        arxiv: identifier, e.g. `2408.08696`; empty where there is none.
        section: section, equation or algorithm that is implemented.
        note: what differs, or what it is ranked or named after.
    """

    authors: str = ""
    title: str = ""
    arxiv: str = ""
    section: str = ""
    note: str = ""

    def __str__(self) -> str:
        arxiv = f"arXiv {self.arxiv}" if self.arxiv else ""
        head = ", ".join(filter(None, (self.authors, self.title, arxiv, self.section)))
        return "; ".join(filter(None, (head, self.note)))


class Method:
    """What every registered method says about itself; its dataclass fields are its settings.

    Attributes:
        name: set by the registry, as users write it.
        family: set by the registry, singular, e.g. `drafter`.
        exactness: set by the registry: what the method promises about the output.
        hidden: set by the registry: left out of lists, hints and `all`; for tests.
        aliases: set by the registry: earlier names, which are still understood.
        needs: what the engine or the installation must be able to do.
        source: paper, section, differences.
        catalogue: numbers of the systems in the catalogue that this method serves.
        missing: for each of those numbers served in part only, what is missing.
        examples: specifications that need no file and no other model; tests run each of them.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    exactness: ClassVar[Exactness]
    hidden: ClassVar[bool] = False
    aliases: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Ability]] = frozenset()
    source: ClassVar[Source] = Source()
    catalogue: ClassVar[tuple[int, ...]] = ()
    missing: ClassVar[Mapping[int, str]] = MappingProxyType({})
    examples: ClassVar[tuple[str, ...]] = ()


class Registry:
    """The methods of one family.

    Args:
        family: singular, as users read it, e.g. `drafter`.
        package: where our own methods live, one module each, e.g. `paceline.drafters`.

    Attributes:
        unavailable: modules and entry points that could not be imported, with the package that
            they need and that is not installed.
    """

    def __init__(self, family: str, package: str) -> None:
        self.family = family
        self.package = package
        self._methods: dict[str, type[Any]] = {}
        self._aliases: dict[str, str] = {}
        self.unavailable: dict[str, str] = {}
        self._loaded = self._loading = False
        self._lock = threading.RLock()

    def register(
        self,
        name: str,
        exactness: Exactness,
        *,
        hidden: bool = False,
        aliases: tuple[str, ...] = (),
    ) -> Callable[[type[Any]], type[Any]]:
        """Register a frozen dataclass that is a `Method`.

        Args:
            name: as users write it.
            exactness: what the method promises about the output; there is no default.
            hidden: leave it out of lists, hints and `all`; for tests.
            aliases: earlier names, which are still understood.

        Raises:
            MethodError: another method of the family has one of the names.
        """

        def decorate(method: type[Any]) -> type[Any]:
            for each in (name, *aliases):
                if each in self._methods or each in self._aliases:
                    raise MethodError(
                        f"two methods ({self.family}) are called {each!r}; rename one of them"
                    )
            method.name, method.family, method.exactness = name, self.family, exactness
            method.hidden, method.aliases = hidden, aliases
            self._methods[name] = method
            self._aliases.update(dict.fromkeys(aliases, name))
            return method

        return decorate

    def methods(self) -> dict[str, type[Any]]:
        """Import the family and return every registered method by name, ours first.

        A module whose import fails for want of another package makes no method; `unavailable`
        names the package.
        """
        if not self._loaded:
            with self._lock:  # others wait, as they must not see a part of the methods
                self._load()
        return self._methods

    def _load(self) -> None:
        if self._loaded or self._loading:  # modules that are being imported may ask, too
            return
        self._loading = True
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                self._attempt(
                    module.name, partial(importlib.import_module, f"{self.package}.{module.name}")
                )
            from importlib.metadata import entry_points  # slow to import

            for entry in entry_points(group=self.package):
                self._attempt(entry.name, entry.load)
            self._loaded = True
        finally:
            self._loading = False

    def _attempt(self, name: str, load: Callable[[], object]) -> None:
        try:
            load()
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "paceline"):
                raise
            self.unavailable[name] = package

    def visible(self) -> dict[str, type[Any]]:
        """Return the methods that lists and hints show: all but the hidden ones."""
        return {name: kind for name, kind in self.methods().items() if not kind.hidden}

    def names(self) -> list[str]:
        """Return every name that is understood, earlier ones included."""
        return [*self.methods(), *self._aliases]

    def current_name(self, name: str) -> str:
        """Return the name that replaced `name`; `name` itself if none did."""
        self.methods()
        return self._aliases.get(name, name)

    def find(self, name: str) -> type[Any]:
        """Return the method that is called `name` now, or was earlier.

        Raises:
            MethodError: there is none; the sentence names the nearest ones, or the package that
                is not installed.
        """
        method = self._own(name) or self.methods().get(self.current_name(name))
        if method is None and name in self.unavailable:
            package = self.unavailable[name]
            raise MethodError(f"the {self.family} {name} needs {package}; pip install {package}")
        if method is None:
            raise MethodError(unknown(self.family, name, self.visible()))
        return method

    def _own(self, name: str) -> type[Any] | None:
        """Return a method of ours whose module is called as it is, without importing the others."""
        module = f"{self.package}.{name}"
        if not self._loaded and name.isidentifier() and importlib.util.find_spec(module):
            self._attempt(name, partial(importlib.import_module, module))
        return self._methods.get(name)

    def parse(self, text: str, positional: bool = False) -> Any:
        """Build the method that `NAME[:key=value,...]` names, with its settings.

        Args:
            text: see `method_spec`.
            positional: leading values may stand without their keys, in the order of the settings.

        Raises:
            MethodError: unknown name or setting, a value of the wrong type, or a required setting
                is missing.
        """
        return self.build(parse_spec(text, self._keys if positional else self._no_keys))

    def parse_several(self, text: str, positional: bool = False) -> list[Any]:
        """Build the methods that `SPEC+SPEC` names.

        Raises:
            MethodError: as `parse`.
        """
        keys = self._keys if positional else self._no_keys
        names = self.names() if ":" in text else None  # without settings, every `+` separates
        return [self.build(spec) for spec in parse_specs(text, names, keys)]

    def _keys(self, name: str) -> list[str]:
        return [each.name for each in dataclasses.fields(self.find(name))]

    def _no_keys(self, name: str) -> list[str]:
        self.find(name)
        return []

    def build(self, spec: MethodSpec) -> Any:
        """Build the method that a specification names.

        Raises:
            MethodError: as `parse`.
        """
        name, method = spec.name, self.find(spec.name)
        known = {f.name for f in dataclasses.fields(method)}
        hints = get_type_hints(method)
        values: dict[str, Any] = {}
        for key, value in spec.settings.items():
            if key not in known:
                raise MethodError(unknown(f"setting of {name}", key, known))
            values[key] = _convert(f"{name}:{key}", value, hints[key])
        missing = [key for key in required(method) if key not in values]
        if missing:
            raise MethodError(f"{name} needs {missing[0]}; write {name}:{missing[0]}=VALUE")
        return method(**values)

    def single(self, name: str, value: object) -> Any:
        """Build the method `name` with its first setting: `single("top_k", 40)`.

        Raises:
            MethodError: as `parse`.
        """
        key = dataclasses.fields(self.find(name))[0].name
        return self.build(MethodSpec(name, {key: str(value)}))


def required(method: type[Any]) -> list[str]:
    """Return the settings of a method that have no default; with any it is not part of `all`."""
    return [
        f.name
        for f in dataclasses.fields(method)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]


def check_range(low: float, high: float, method: str, **settings: float) -> None:
    """Refuse settings outside `low..high`, and NaN.

    Raises:
        MethodError: names the setting, its value and the limits.
    """
    for name, value in settings.items():
        if not low <= value <= high:
            raise MethodError(f"{method}:{name} is {value}, expected {low} to {high}")


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
heads = Registry("head", "paceline.drafters.heads")
controls = Registry("control", "paceline.control")
guides = Registry("guide", "paceline.control.guides")
strategies = Registry("strategy", "paceline.decoding.strategies")
watermarks = Registry("watermark", "paceline.watermarks")
kv_policies = Registry("kv policy", "paceline.kvcache")
patterns = Registry("attention pattern", "paceline.attention")
exits = Registry("exit policy", "paceline.exits")
pruners = Registry("pruner", "paceline.compress.prune")
quantizers = Registry("quantizer", "paceline.compress.quantize")
factorizers = Registry("factorizer", "paceline.compress.lowrank")
structures = Registry("structure", "paceline.compress.structure")
transforms = Registry("transform", "paceline.compress.transform")
corrections = Registry("correction", "paceline.compress.correction")
tuners = Registry("tuner", "paceline.compress.tune")
allocators = Registry("allocator", "paceline.compress.allocate")

FAMILIES: dict[str, Registry] = {
    registry.family: registry
    for registry in (
        drafters,
        heads,
        controls,
        guides,
        strategies,
        watermarks,
        kv_policies,
        patterns,
        exits,
        pruners,
        quantizers,
        factorizers,
        structures,
        transforms,
        corrections,
        tuners,
        allocators,
    )
}

"""Parsers of option values: lists, numbers and names with settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from paceline.errors import MethodError, RequestError

if TYPE_CHECKING:
    from paceline.control.base import ControlMethod
    from paceline.drafters.base import DraftMethod
    from paceline.request_options import RequestOptions


def split_drafters(texts: Sequence[str]) -> list[str]:
    """Return the drafters that `--drafters` names, each once; see its help for the syntax.

    Raises:
        MethodError: a setting has no value, or is given twice.
    """
    from paceline.method_spec import split_list
    from paceline.registry import drafters

    names = [*drafters.names(), "all"]
    specs = [str(spec) for text in texts for spec in split_list(text, names)]
    return list(dict.fromkeys(specs))


def find_drafters(texts: Sequence[str]) -> tuple[dict[str, DraftMethod], list[str]]:
    """Return the drafters by name, and those of `all` left out because they need something.

    Raises:
        MethodError: unknown name or setting, or none named.
    """
    from paceline.core import Exactness
    from paceline.registry import drafters, required

    names: list[str] = []
    left_out: list[str] = []
    for name in split_drafters(texts):
        if name != "all":
            names.append(name)
            continue
        for known, method in drafters.methods().items():
            if method.exactness is Exactness.EXACT and not method.hidden:
                (left_out if method.needs or required(method) else names).append(known)
    methods: dict[str, DraftMethod] = {name: drafters.parse(name) for name in names}
    if not methods:
        raise MethodError("no drafter is named; see `paceline methods`")
    return methods, left_out


def lossy(methods: Mapping[str, DraftMethod]) -> list[str]:
    """Return the names of the drafters that may change the output."""
    from paceline.core import Exactness

    return [name for name, method in methods.items() if method.exactness is Exactness.LOSSY]


def parse_sampler(text: str | None) -> tuple[list[ControlMethod] | None, float | None]:
    """Return the controls of `--sampler` and its temperature; None for what is not given.

    Raises:
        MethodError: unknown control or setting.
        RequestError: a value out of range, or not a number.
    """
    from paceline.control.sampler_spec import SamplerSpec

    if text is None:
        return None, None
    spec = SamplerSpec.parse(text)
    return list(spec.methods), spec.temperature


def one_temperature(option: float | None, sampler: float | None) -> float | None:
    """Return the temperature that `--temperature` and `--sampler` agree on.

    Raises:
        RequestError: they do not.
    """
    if option is not None and sampler is not None and option != sampler:
        raise RequestError(
            f"--temperature is {option:g} and --sampler says {sampler:g}; give one of them"
        )
    return sampler if option is None else option


def beside_sampler(
    controls: Sequence[ControlMethod] | None, named: RequestOptions
) -> RequestOptions:
    """Return the samplers of `--top-p` and its like that `--sampler` does not give already.

    Raises:
        RequestError: `--sampler` gives another value.
        MethodError: a value is out of range.
    """
    from paceline.registry import controls as registry

    known = {control.name: control for control in controls or ()}
    rest: dict[str, Any] = {}
    for name, value in named.items():
        if value is None:
            continue
        if name not in known:
            rest[name] = value
        elif registry.single(name, value) != known[name]:
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(f"{flag} is {value} and --sampler has another {name}; give one")
    return cast("RequestOptions", rest)


def stops(texts: Sequence[str] | None) -> list[str]:
    """Return the stop strings.

    Raises:
        RequestError: one is empty, or no text.
    """
    for text in texts or ():
        if not text:
            raise RequestError("--stop is empty, expected the text that ends the output")
        if text != text.encode(errors="replace").decode():
            raise RequestError(f"--stop is {text!r}, which is not UTF-8 text")
    return list(texts or ())


def numbers(name: str, text: str) -> list[float]:
    """Return the numbers of a comma-separated list, each once.

    Raises:
        RequestError: one of them is none, is negative, or there is none.
        MethodError: one of them is empty.
    """
    from paceline.control.sampler_spec import number
    from paceline.method_spec import members

    values = [number(name, item) for item in members(name, text, ",")]
    if not values or min(values) < 0:
        raise RequestError(f"{name} is {text!r}, expected numbers of 0 or more, with commas")
    return list(dict.fromkeys(values))


def limits(name: str, text: str) -> tuple[float, float]:
    """Return the two numbers of LOW..HIGH; a single one is both.

    Raises:
        RequestError: one of them is none.
    """
    from paceline.control.sampler_spec import number

    low, dots, high = text.partition("..")
    return number(name, low), number(name, high if dots else low)


def whole_limits(name: str, text: str) -> tuple[int, int]:
    """Return the two whole numbers of LOW..HIGH.

    Raises:
        RequestError: one of them is none.
    """
    low, high = limits(name, text)
    if low != int(low) or high != int(high):
        raise RequestError(f"{name} is {text!r}, expected whole numbers, as in 1..16")
    return int(low), int(high)


def one_budget(text: str) -> int | str:
    """Return a number of nodes, or `auto`.

    Raises:
        RequestError: neither.
    """
    budget = text.strip()
    if budget == "auto":
        return budget
    if not (budget.isascii() and budget.isdecimal() and len(budget) < 5 and int(budget) <= 4096):
        raise RequestError(f"--budget is {budget!r}, expected 0 to 4096 nodes, or auto")
    return int(budget)


def budgets(text: str) -> list[int | str]:
    """Return the budgets of a comma-separated list, each once.

    Raises:
        RequestError: one is neither 0 to 4096 nor `auto`, or there is none.
    """
    return list(dict.fromkeys(one_budget(item) for item in text.split(",")))

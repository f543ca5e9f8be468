"""Groups of options: a frozen dataclass declares them once, a verb takes it as one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args, get_type_hints

Verb = Callable[..., None]


def spread(verb: Verb) -> Verb:
    """The verb as typer reads it: instead of each group one option for every field.

    A parameter whose annotation is a dataclass is a group. Its fields are annotated as a verb's
    own options are, and the first line of its docstring is the title of their panel in `--help`.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, type[Any]] = {}
    options: list[Parameter] = []
    for name, parameter in signature(verb).parameters.items():
        kind = hints.get(name)
        if isinstance(kind, type) and is_dataclass(kind):
            groups[name] = kind
            options += _options(kind)
        else:
            options.append(parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY))
    if not groups:
        return verb

    @wraps(verb)
    def gathered(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        verb(**given)

    setattr(gathered, "__signature__", Signature(options))  # noqa: B010
    gathered.__annotations__ = {option.name: option.annotation for option in options}
    return gathered


def _options(group: type[Any]) -> Iterator[Parameter]:
    title = (group.__doc__ or "").partition("\n")[0].removesuffix(".")
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        yield Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=_titled(kind, option, title),
        )


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default


def _titled(kind: Any, option: Any, title: str) -> Any:
    option = copy(option)
    option.rich_help_panel = title
    return Annotated[kind, option]

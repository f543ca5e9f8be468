"""Tools from Python functions: the JSON schema of a function's parameters."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from paceline.errors import RequestError

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
    None: {"type": "null"},
    Any: {},
    object: {},
}
_JSON_VALUES = (str, int, float, bool, type(None))
_SECTION = re.compile(r"(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ARGUMENT = re.compile(r"(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def function_tool(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the tool that describes a Python function, as OpenAI's API has it.

    Parameters take their types from the annotations and their descriptions from the `Args:`
    section of the docstring; the text before the first section describes the function. Parameters
    without a default are required.

    Args:
        function: its parameters can all be given by name. Annotations may be `str`, `int`,
            `float`, `bool`, `list`, `tuple`, `dict`, `Literal`, `Enum`, unions of these, and
            `Annotated[type, "description"]`; without an annotation any JSON value is allowed.

    Raises:
        RequestError: a parameter cannot be given by name, or its type has no JSON schema.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise RequestError(f"the tool {name} has no signature that can be read") from None
    hints = _hints(function, name)
    summary, described = _docstring(inspect.getdoc(function) or "")
    properties, required = dict[str, Any](), list[str]()
    for parameter in parameters.values():
        where = f"the parameter {parameter.name} of the tool {name}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise RequestError(f"{where} is positional-only; give it a name")
        schema = type_schema(hints.get(parameter.name, Any), where)
        if parameter.name in described and "description" not in schema:
            schema = {**schema, "description": described[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    return {
        "name": name,
        "description": summary,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        },
    }


def type_schema(hint: Any, where: str) -> dict[str, Any]:
    """Return the JSON schema of a type.

    Args:
        hint: an annotation, see `function_tool`.
        where: names it in an error message.

    Raises:
        RequestError: it has none.
    """
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enumeration([member.value for member in hint], where)
    if _hashable(hint) and hint in _SIMPLE:
        return dict(_SIMPLE[hint])
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        texts = [each for each in arguments[1:] if isinstance(each, str)]
        return type_schema(arguments[0], where) | ({"description": texts[0]} if texts else {})
    if origin is Literal:
        return _enumeration(list(arguments), where)
    if origin is Union or origin is types.UnionType:
        return {"anyOf": [type_schema(each, where) for each in arguments]}
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        items = [type_schema(each, where) for each in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "items": False}
    if origin in (list, tuple, AbstractSequence):
        item = type_schema(arguments[0], where) if arguments else {}
        return {"type": "array", "items": item}
    if origin in (dict, AbstractMapping) and (not arguments or arguments[0] is str):
        value = type_schema(arguments[1], where) if arguments else {}
        return {"type": "object", "additionalProperties": value}
    raise RequestError(
        f"{where} has the type {hint!s:.80}, which has no JSON schema here; annotate it with str, "
        "int, float, bool, list, dict, Literal or Enum, or give the tool as a dict"
    )


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    if not values or not all(isinstance(value, _JSON_VALUES) for value in values):
        raise RequestError(f"{where} has choices that JSON cannot hold; use texts or numbers")
    return {"enum": values}


def _hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return get_type_hints(target, include_extras=True)
    except Exception as error:  # annotations are evaluated, and may raise anything
        raise RequestError(f"the annotations of the tool {name} cannot be read: {error}") from None


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description of a function, and that of each parameter in its `Args:` section."""
    summary, described = list[str](), dict[str, str]()
    section, current, indent = "", "", 0
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            section, current = heading[1], ""
        elif not section:
            summary.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            item = _ARGUMENT.match(line.strip())
            if item and (not current or depth <= indent):
                current, indent = item[1], depth
                described[current] = item[2].strip()
            elif current:
                described[current] += " " + line.strip()
    return "\n".join(summary).strip(), described


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

"""What follows from JSON schemas: which exclude each other, and the negation of simple ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

from paceline.control.structured.schema_patterns import none_of

TYPES = ("null", "boolean", "number", "string", "array", "object")
_NESTING = 12  # references followed, at most
# Keyword of a lower bound, that of the upper bound behind it, what they count, and the type.
_COUNTS = (
    ("minLength", "maxLength", "string"),
    ("minItems", "maxItems", "array"),
    ("minProperties", "maxProperties", "object"),
)
_KEYWORDS = """
type enum const anyOf allOf oneOf not if $ref required properties patternProperties
additionalProperties propertyNames dependentRequired dependentSchemas dependencies items
prefixItems additionalItems contains minContains maxContains uniqueItems minItems maxItems
minLength maxLength pattern minProperties maxProperties minimum maximum exclusiveMinimum
exclusiveMaximum multipleOf unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef
"""
KEYWORDS = frozenset(_KEYWORDS.split())  # those that restrict values


class InexpressibleError(Exception):
    """A negation or a set of values that JSON Schema without `not` cannot express."""


def resolve(schema: Any, root: Any) -> Any:
    """Return what a schema that is only a reference within the document refers to.

    Raises:
        InexpressibleError: the reference leaves the document, or leads nowhere.
    """
    for _ in range(_NESTING):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema
        if KEYWORDS & schema.keys() != {"$ref"}:
            raise InexpressibleError("$ref beside other keywords")
        path, schema = str(schema["$ref"]), root
        if path != "#" and not path.startswith("#/"):
            raise InexpressibleError(f"the reference {path}")
        for name in path[2:].split("/") if path != "#" else ():
            key = unquote(name).replace("~1", "/").replace("~0", "~")
            try:
                schema = schema[int(key)] if isinstance(schema, list) else schema[key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise InexpressibleError(f"the reference {path}") from None
    raise InexpressibleError("references to references")


def type_of(value: Any) -> str:
    """Return the JSON type of a value; integers are numbers."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = ((str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in names if isinstance(value, kind)), "number")


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0 but not true."""
    if type_of(a) != type_of(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return the values without repetitions, in their order."""
    kept = list[Any]()
    for value in values:
        if not any(same(value, other) for other in kept):
            kept.append(value)
    return kept


def types(schema: Any) -> set[str]:
    """Return the types that a schema's own keywords allow."""
    if isinstance(schema, bool):
        return set(TYPES) if schema else set()
    allowed = set(TYPES)
    if "type" in schema:
        named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        allowed = {"number" if name == "integer" else str(name) for name in named}
    listed = values(schema)
    return allowed if listed is None else allowed & {type_of(value) for value in listed}


def values(schema: Any) -> list[Any] | None:
    """Return the values that `const` or `enum` lists, or None."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else None


# ------------------------------------------------------------------------------------- disjoint


def disjoint(a: Any, b: Any, root: Any, depth: int = 0) -> bool:
    """Whether no value follows both schemas; False where that is not proven."""
    if depth > _NESTING:
        return False
    left, right = _conjuncts(a, root, depth), _conjuncts(b, root, depth)
    every = [*left, *right]
    common = set.intersection(*(types(each) for each in every)) if every else set(TYPES)
    if not common:
        return True
    pairs = [(x, y) for x in left for y in right]
    if any(_excludes(x, y) or _excludes(y, x) for x, y in pairs):
        return True
    for side, other in ((left, b), (right, a)):
        for keyword in ("anyOf", "oneOf"):
            for part in side:
                options = part.get(keyword)
                if options and all(disjoint(each, other, root, depth + 1) for each in options):
                    return True
    return all(_disjoint_in(name, left, right, root, depth) for name in common)


def _conjuncts(schema: Any, root: Any, depth: int) -> list[Mapping[str, Any]]:
    """Return the schemas that a value must follow: references and `allOf` are opened."""
    try:
        schema = resolve(schema, root)
    except InexpressibleError:
        return []
    if schema is False:
        return [{"enum": []}]
    if not isinstance(schema, Mapping):
        return []
    parts = schema.get("allOf", ()) if depth < _NESTING else ()
    return [schema, *(each for part in parts for each in _conjuncts(part, root, depth + 1))]


def _excludes(x: Mapping[str, Any], y: Mapping[str, Any]) -> bool:
    """Whether `y` refuses each value that `x` lists."""
    listed = values(x)
    return listed is not None and all(_excluded(value, y) for value in listed)


def _disjoint_in(
    name: str, left: list[Mapping[str, Any]], right: list[Mapping[str, Any]], root: Any, depth: int
) -> bool:
    """Whether no value of one type follows all schemas of both sides."""
    pairs = [(x, y) for x in left for y in right]
    if name == "number":
        return any(_apart(x, y) or _apart(y, x) for x, y in pairs)
    for low, high, kind in _COUNTS:
        if kind == name and any(
            each.get(low, 0) > other.get(high, float("inf"))
            for x, y in pairs
            for each, other in ((x, y), (y, x))
        ):
            return True
    if name != "object":
        return False
    needed = {key for each in (*left, *right) for key in each.get("required", ())}
    return any(
        disjoint(_property(x, key), _property(y, key), root, depth + 1)
        for key in sorted(needed)
        for x, y in pairs
    )


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether every number of `a` lies below those of `b`."""
    highs = _bounds(a, "maximum", "exclusiveMaximum")
    lows = _bounds(b, "minimum", "exclusiveMinimum")
    return any(h < v or (h == v and (x or y)) for h, x in highs for v, y in lows)


def _bounds(schema: Mapping[str, Any], *keywords: str) -> list[tuple[float, bool]]:
    """Return the bounds that a schema sets, and whether each is exclusive."""
    return [(schema[k], k[0] == "e") for k in keywords if _number(schema.get(k))]


def _property(schema: Mapping[str, Any], key: str) -> Any:
    """Return a schema that the value of a property follows, `True` where it is not known."""
    if key in schema.get("properties", {}):
        return schema["properties"][key]
    closed = schema.get("additionalProperties", True) is False
    return not (closed and not schema.get("patternProperties"))


def _excluded(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a schema's own keywords certainly refuse a value."""
    listed = values(schema)
    if listed is not None:
        return not any(same(value, other) for other in listed)
    if type_of(value) not in types(schema):
        return True
    if type_of(value) == "number":
        if schema.get("type") == "integer" and value != int(value):
            return True
        point = {"minimum": value, "maximum": value}
        return _apart(point, schema) or _apart(schema, point)
    if isinstance(value, str):
        return not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    return False


# -------------------------------------------------------------------------------------- negation


def negation(schema: Any, root: Any, narrow: bool = False, depth: int = 0) -> Any:
    """Return a schema that exactly the values follow that `schema` refuses.

    Args:
        schema: a part of `root`.
        root: the document.
        narrow: leave out the values refused by a keyword alone that has no negation, if there
            are others.
        depth: levels above this schema.

    Raises:
        InexpressibleError: names the keyword that has no negation.
    """
    if depth > _NESTING:
        raise InexpressibleError("schemas nested too deeply")
    schema = resolve(schema, root)
    if isinstance(schema, bool):
        return not schema
    if "if" in schema or not isinstance(schema, Mapping):
        raise InexpressibleError("if")
    options, missing = list[Any](), None
    for keyword in schema:
        if keyword not in KEYWORDS:
            continue
        try:
            options += _negated(
                keyword, schema, lambda part: negation(part, root, narrow, depth + 1), narrow
            )
        except InexpressibleError as error:
            missing = error
    if missing and not (narrow and any(option is not False for option in options)):
        raise missing
    return any_of(options)


def any_of(options: list[Any]) -> Any:
    """Return the schema of values that follow one of the options."""
    kept = [option for option in options if option is not False]
    if len(kept) < 2:
        return kept[0] if kept else False
    return {"anyOf": kept}


def _negated(
    keyword: str, schema: Mapping[str, Any], no: Callable[[Any], Any], narrow: bool
) -> list[Any]:
    """Return schemas for the values that one keyword refuses."""
    value = schema[keyword]
    if keyword == "type":
        named = value if isinstance(value, list) else [value]
        if "integer" in named and "number" not in named and not narrow:
            raise InexpressibleError("the type integer")
        counted = {"number" if name == "integer" else name for name in named}
        return [{"type": name} for name in TYPES if name not in counted]
    if keyword in ("enum", "const"):
        return _other_values([value] if keyword == "const" else value)
    if keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        return _other_numbers(keyword, schema)
    for low, high, kind in _COUNTS:
        if keyword == low:
            return [{"type": kind, high: value - 1}] if value > 0 else []
        if keyword == high:
            return [{"type": kind, low: value + 1}]
    if keyword == "required":
        return [{"type": "object", "properties": {key: False}} for key in value]
    if keyword == "properties":
        return _other_properties(value, no, narrow)
    if keyword == "anyOf":
        return [{"allOf": [no(each) for each in value]}]
    if keyword == "allOf":
        return [no(each) for each in value]
    if keyword == "not":
        return [value]
    if value is True and keyword in ("additionalProperties", "items"):
        return []
    raise InexpressibleError(keyword)


def _other_properties(
    properties: Mapping[str, Any], no: Callable[[Any], Any], narrow: bool
) -> list[Any]:
    """Return schemas for the objects in which the value of a property is refused."""
    options, missing = list[Any](), None
    for key, each in properties.items():
        try:
            other = no(each)
        except InexpressibleError as error:
            missing = error
            continue
        if other is not False:
            options.append({"type": "object", "properties": {key: other}, "required": [key]})
    if missing and not (narrow and options):
        raise missing
    return options


def _other_values(listed: list[Any]) -> list[Any]:
    """Return schemas for every value that is not listed."""
    texts = [value for value in listed if isinstance(value, str)]
    numbers = sorted({value for value in listed if type_of(value) == "number"})
    flags = [value for value in listed if isinstance(value, bool)]
    if any(isinstance(value, list | dict) for value in listed):
        raise InexpressibleError("enum with arrays or objects")
    other: list[Any] = [{"type": "array"}, {"type": "object"}]
    other += [] if None in listed else [{"type": "null"}]
    other.append({"enum": [flag for flag in (True, False) if flag not in flags]})
    other.append({"type": "string", "pattern": none_of(texts)} if texts else {"type": "string"})
    for low, high in pairwise([None, *numbers, None]):
        bounds = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        other.append({"type": "number"} | {k: v for k, v in bounds.items() if v is not None})
    return [each for each in other if each != {"enum": []}]


def _other_numbers(keyword: str, schema: Mapping[str, Any]) -> list[Any]:
    """Return a schema for the numbers beyond a bound, of any draft."""
    value = schema[keyword]
    if isinstance(value, bool):  # draft 4: belongs to the bound beside it
        return []
    end = keyword[-7:].lower()  # minimum or maximum
    exclusive = keyword.startswith("exclusive") or schema.get(f"exclusive{end.title()}") is True
    opposite = "maximum" if end == "minimum" else "minimum"
    return [{"type": "number", opposite if exclusive else f"exclusive{opposite.title()}": value}]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Rewrite a JSON schema so that llguidance enforces it, or refuse what cannot be enforced."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from math import ceil, floor
from typing import Any, NoReturn

from paceline.control.structured.schema_logic import (
    KEYWORDS,
    TYPES,
    InexpressibleError,
    any_of,
    disjoint,
    distinct,
    negation,
    resolve,
    types,
    values,
)
from paceline.control.structured.schema_patterns import one_of, safe_pattern, writable
from paceline.errors import RequestError

# Formats that llguidance enforces; all others are annotations, as the specification says.
FORMATS = {
    "date-time",
    "date",
    "time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
}
_OLD = ("draft-03", "draft-04", "draft-06", "draft-07")
_NUDGE = 1e-12  # the least distance from an exclusive bound that is written
_MOST = 400  # arrays of different values that are listed
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SINGLE = ("items", "additionalItems", "additionalProperties", "if", "then", "else", "not")
_NEVER = ("contains", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef")


def rewrite(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema for llguidance whose texts follow the given one.

    Keywords that it lacks become `anyOf` of cases; formats that it does not know are dropped; what
    it reads wrongly is put differently. References stay, as definitions keep their places.

    Raises:
        RequestError: names the keyword that cannot be enforced, or the schema is not valid.
    """
    try:
        made: dict[str, Any] = _Rewriter(schema).schema(schema, 0)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise RequestError(f"the schema is not a valid JSON schema: {error!s:.100}") from None
    except RecursionError:
        raise RequestError("the schema is nested too deeply") from None
    options = made.get("x-guidance")
    if isinstance(options, Mapping) and "json_allowed_escapes" in options:
        escapes = str(options["json_allowed_escapes"]).replace("u", "")
        made["x-guidance"] = {**options, "json_allowed_escapes": escapes}
    return made


class _Rewriter:
    """The rewriting of one document."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.old = any(draft in str(root.get("$schema")) for draft in _OLD)
        self.fractions = _has_fraction(root)

    def schema(self, schema: Any, depth: int) -> Any:
        """Return a schema in its new form.

        Raises:
            RequestError: as `rewrite`.
        """
        if not isinstance(schema, Mapping):
            return schema
        if depth > 200:
            raise RequestError("the schema's conditions are nested too deeply")
        made = dict(schema)
        if self.old and "$ref" in made:  # up to draft 7, nothing beside a reference counts
            made = {k: v for k, v in made.items() if k == "$ref" or k not in KEYWORDS}
            made = {k: v for k, v in made.items() if k not in ("format", "then", "else")}
        for keyword in _NEVER:
            if keyword in made:
                _refuse(keyword, "remove it, or check the finished output")
        for keyword in ("const", "enum", "required"):
            if not writable(made.get(keyword)):
                _refuse(f"control character in {keyword}", "only those with a short escape can")
        if not all(map(writable, made.get("properties", ()))):
            _refuse("control character in properties", "only those with a short escape can")
        extra = [case for rule in _RULES for case in rule(self, made)]
        self._children(made, depth)
        self._strings(made)
        self._numbers(made)
        _members(made)
        if extra:
            parts = [self.schema(case, depth + 1) for case in extra]
            made["allOf"] = [*made.get("allOf", ()), *parts]
        return made

    def _children(self, made: dict[str, Any], depth: int) -> None:
        """Rewrite all schemas within one."""
        for keyword in _SINGLE:
            if isinstance(made.get(keyword), Mapping):
                made[keyword] = self.schema(made[keyword], depth + 1)
        for keyword in (*_LISTS, "items"):
            if isinstance(made.get(keyword), list):
                made[keyword] = [self.schema(each, depth + 1) for each in made[keyword]]
        for keyword in _MAPS:
            if isinstance(made.get(keyword), Mapping):
                items = made[keyword].items()
                if keyword == "patternProperties":
                    items = [(_pattern(key), each) for key, each in items]
                made[keyword] = {key: self.schema(each, depth + 1) for key, each in items}

    def _strings(self, made: dict[str, Any]) -> None:
        if "format" in made and made["format"] not in FORMATS:
            del made["format"]
        if isinstance(made.get("pattern"), str):
            made["pattern"] = _pattern(made["pattern"])

    def _numbers(self, made: dict[str, Any]) -> None:
        """Move exclusive bounds: beside a fraction, llguidance takes whole ones as inclusive."""
        for keyword, sign in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
            value = made.get(keyword)
            plain = keyword[-7:].lower()
            if value is True:
                if plain in made:
                    made[keyword] = made.pop(plain)
                    value = made[keyword]
                else:
                    del made[keyword]
            elif value is False:
                del made[keyword]
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if made.get("type") == "integer":
                whole = floor(value) + 1 if sign > 0 else ceil(value) - 1
                other = made.get(plain, whole)
                made[plain] = max(whole, other) if sign > 0 else min(whole, other)
                del made[keyword]
            elif self.fractions and value == int(value):
                made[keyword] = round(value + sign * max(_NUDGE, abs(value) * 1e-12), 13)

    # ---------------------------------------------------------------- rules: keywords to cases

    def either(self, made: dict[str, Any]) -> list[Any]:
        """Turn `oneOf` into `anyOf`: branches that may overlap exclude each other's values."""
        branches = made.pop("oneOf", None)
        if branches is None:
            return []
        base = {k: made[k] for k in KEYWORDS - {"anyOf", "allOf", "not", "if"} if k in made}
        whole = [
            branch if "$ref" in base else {"allOf": [base, branch]} if base else branch
            for branch in branches
        ]
        options = []
        for i, branch in enumerate(branches):
            others = [
                branches[j]
                for j in range(len(branches))
                if j != i and not disjoint(whole[i], whole[j], self.root)
            ]
            parts = [
                self._no(other, "oneOf with branches that may overlap", True) for other in others
            ]
            options.append({"allOf": [branch, *parts]} if parts else branch)
        if "anyOf" in made:
            return [{"anyOf": options}]
        made["anyOf"] = options
        return []

    def negated(self, made: dict[str, Any]) -> list[Any]:
        """Turn `not` into what it leaves."""
        return [self._no(made.pop("not"), "not")] if "not" in made else []

    def condition(self, made: dict[str, Any]) -> list[Any]:
        """Turn `if`, `then` and `else` into two cases."""
        then, other = made.pop("then", True), made.pop("else", True)
        if "if" not in made:
            return []
        test = made.pop("if")
        cases = [{"allOf": [test, then]} if then is not False else False]
        if other is not False:
            cases.append({"allOf": [self._no(test, "if"), other]})
        return [] if then is True and other is True else [any_of(cases)]

    def dependent(self, made: dict[str, Any]) -> list[Any]:
        """Turn what depends on a property into two cases: without it, and with both."""
        cases = []
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needed in dict(made.pop(keyword, {})).items():
                absent = {"properties": {name: False}}
                present: dict[str, Any] = {"required": [name]}
                if isinstance(needed, list):
                    present["required"] = distinct([name, *needed])
                elif isinstance(needed, str):
                    present["required"] = distinct([name, needed])
                else:
                    present = {"allOf": [present, needed]}
                cases.append({"anyOf": [absent, present]})
        return cases

    def names(self, made: dict[str, Any]) -> list[Any]:
        """Turn `propertyNames` into `patternProperties`."""
        if "propertyNames" not in made:
            return []
        rule = self._resolved(made.pop("propertyNames"), "propertyNames")
        if rule is False:
            return [{"maxProperties": 0}]
        allowed = values(rule)
        checks = {} if rule is True else {k: v for k, v in rule.items() if k in KEYWORDS}
        if checks in ({}, {"type": "string"}):
            return []
        listed, rest = made.get("properties", {}), made.get("additionalProperties", True)
        closed = rest is False and "patternProperties" not in made
        if allowed is not None and not checks.keys() - {"enum", "const", "type"}:
            texts = [t for t in allowed if isinstance(t, str)] if "string" in types(rule) else []
            made["properties"] = {k: v if k in texts else False for k, v in listed.items()}
            if "patternProperties" in made:
                _refuse("propertyNames beside patternProperties", "put the names into the patterns")
            free = [text for text in texts if text not in listed]
            if not closed and free:
                made["patternProperties"] = {one_of(free): rest}
            made["additionalProperties"] = False
            return []
        pattern = _name_pattern(checks)
        if pattern is None or listed or "patternProperties" in made or made.get("required"):
            _refuse("propertyNames", "give an enum, or a pattern and no other names of properties")
        if not closed:
            made |= {"patternProperties": {pattern: rest}, "additionalProperties": False}
        return []

    def unique(self, made: dict[str, Any]) -> list[Any]:
        """Turn `uniqueItems` into the list of all arrays of different values, if they are few."""
        wanted = made.pop("uniqueItems", False)
        if not isinstance(wanted, bool):
            raise TypeError(f"uniqueItems is {wanted!r}, expected true or false")
        if not wanted or "array" not in types(made):
            return []
        low, high = made.get("minItems", 0), made.get("maxItems", float("inf"))
        if high < 2:
            return []
        items = made.get("items", True)
        members = self._members_of(items) if "prefixItems" not in made else None
        if members is None:
            _refuse("uniqueItems", "give items a small enum, or maxItems 1")
        arrays = list[Any]()
        for count in range(low, min(len(members), high) + 1):
            for array in permutations(members, count):
                arrays.append(list(array))
                if len(arrays) > _MOST:
                    _refuse("uniqueItems of so many values", "list at most five, or lower maxItems")
        other = [name for name in TYPES if name != "array" and name in types(made)]
        found: Any = {"enum": arrays} if arrays else False
        for keyword in ("items", "minItems", "maxItems"):
            made.pop(keyword, None)
        return [any_of([found, {"type": other} if other else False])]

    def _members_of(self, items: Any) -> list[Any] | None:
        """Return all values that items can have, or None if they are not known to be few."""
        try:
            items = resolve(items, self.root)
        except InexpressibleError:
            return None
        listed = values(items)
        if items is False:
            return []
        if not isinstance(items, Mapping) or KEYWORDS & items.keys() - {"type", "enum", "const"}:
            return None
        if listed is None and types(items) <= {"null", "boolean"}:
            listed = [None, True, False]
        if listed is None:
            return None
        integer = items.get("type") == "integer"
        kept = [v for v in listed if not disjoint({"const": v}, items, self.root)]
        return distinct(int(v) if integer else v for v in kept)

    def _no(self, schema: Any, keyword: str, narrow: bool = False) -> Any:
        """Return a schema's negation.

        Raises:
            RequestError: it has none.
        """
        try:
            return negation(schema, self.root, narrow)
        except InexpressibleError as error:
            raise RequestError(
                f"the schema's {keyword} cannot be enforced because of {error}; give cases that "
                "differ in type, in an enum or in a required property"
            ) from None

    def _resolved(self, schema: Any, keyword: str) -> Any:
        try:
            return resolve(schema, self.root)
        except InexpressibleError as error:
            raise RequestError(f"the schema's {keyword} cannot be enforced: {error}") from None


_RULES = (
    _Rewriter.either,
    _Rewriter.negated,
    _Rewriter.condition,
    _Rewriter.dependent,
    _Rewriter.names,
    _Rewriter.unique,
)


def _refuse(keyword: str, hint: str) -> NoReturn:
    raise RequestError(f"the schema's {keyword} cannot be enforced; {hint}")


def _pattern(pattern: str) -> str:
    try:
        return safe_pattern(pattern)
    except ValueError as error:
        raise RequestError(f"the schema's pattern {pattern!r:.80} is invalid: {error}") from None


def _name_pattern(checks: Mapping[str, Any]) -> str | None:
    """Return a pattern for names that follow a pattern or bounds of length."""
    keys = checks.keys() - {"type"}
    if keys == {"pattern"}:
        return str(checks["pattern"])
    if keys <= {"minLength", "maxLength"}:
        return f"^(?s:.{{{checks.get('minLength', 0)},{checks.get('maxLength', '')}}})$"
    return None


def _members(made: dict[str, Any]) -> None:
    """Refuse `minProperties` where free keys would count: the grammar lets a key come twice."""
    free = made.get("minProperties", 0) - len(set(made.get("required", ())))
    closed = made.get("additionalProperties", True) is False and not made.get("patternProperties")
    if free > 1 and not closed:
        _refuse(f"minProperties {made['minProperties']}", "name the properties in required")
    if free <= 0 and "maxProperties" not in made and made.get("type") == "object":
        made.pop("minProperties", None)


def _has_fraction(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_fraction(each) for each in value.values())
    if isinstance(value, list):
        return any(_has_fraction(each) for each in value)
    return isinstance(value, float) and value != int(value)

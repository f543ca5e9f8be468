"""Grammars of rewritten JSON schemas accept what `jsonschema` accepts, keyword by keyword."""

import json
from itertools import permutations

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.grammar import Grammar, _json_grammar
from paceline.control.structured.schema_logic import KEYWORDS
from paceline.control.structured.schema_patterns import none_of, one_of
from paceline.control.structured.schema_rewrite import rewrite
from paceline.errors import RequestError

llguidance = pytest.importorskip("llguidance")
BYTES = llguidance.LLTokenizer("byte")


def compiled(schema):
    """The matcher of a schema; an error names why it is refused."""
    grammar = _json_grammar(Grammar.schema(schema).text)
    return llguidance.LLMatcher(BYTES, grammar, log_level=0)


def takes(matcher, text):
    fresh, tokens = matcher.deep_copy(), BYTES.tokenize_str(text)
    return fresh.try_consume_tokens(tokens) == len(tokens) and fresh.is_accepting()


def texts(value):
    """A value's texts, with the keys of objects in every order."""
    if isinstance(value, dict):
        parts = [[f"{json.dumps(k)}: {t}" for t in texts(v)] for k, v in value.items()]
        for order in permutations(parts):
            yield from (f"{{{', '.join(row)}}}" for row in rows(order))
    elif isinstance(value, list):
        yield from (f"[{', '.join(row)}]" for row in rows([list(texts(v)) for v in value]))
    else:
        yield json.dumps(value, ensure_ascii=False)


def rows(parts):
    if not parts:
        return [[]]
    return [[first, *rest] for first in parts[0] for rest in rows(parts[1:])]


def valid(schema, value):
    return jsonschema.validators.validator_for(schema)(schema).is_valid(value)


OLD = "http://json-schema.org/draft-07/schema#"
VALUES = [
    None, True, False, 0, 1, 2, 3, -1, 0.5, 0.25, 1.5, "", "a", "b", "ab", "abc", '"', "\\", "\n",
    'a"', [], [1], [1, 2], [2, 1], [1, 1], ["a"], [True, False], [True, True], {}, {"a": 1},
    {"b": 1}, {"a": "x"}, {"a": 1, "b": 1}, {"b": 1, "a": "x"}, {"a": 1, "c": 1}, {"ab": 1},
    {"k": "s", "n": 1}, {"k": "t", "n": 1}, {"k": "t"}, {"k": "s"}, {"a": 1, "b": 1, "c": 1},
]  # fmt: skip
SCHEMAS = [
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": -1},
    {"allOf": [{"exclusiveMinimum": 1}, {"maximum": 1.5}]},
    {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 3},
    {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 1, "exclusiveMinimum": True},
    {"type": "string", "pattern": '^[^"]{1,2}$'},
    {"type": "string", "pattern": "^[^\\\\]*$"},
    {"type": "string", "pattern": '^[^\\s"a]+$'},
    {"type": "string", "pattern": "^[\\x00-!#-~]$"},
    {"type": "string", "format": "path"},
    {"properties": {"format": {"type": "integer", "format": "int32"}}, "format": "thing"},
    {"uniqueItems": True, "items": {"enum": [1, 2, "a"]}},
    {"uniqueItems": True, "type": "array", "items": {"type": "boolean"}, "minItems": 1},
    {"uniqueItems": True, "items": {"$ref": "#/$defs/one"}, "$defs": {"one": {"enum": [1]}}},
    {"propertyNames": {"enum": ["a", "c"]}, "type": "object"},
    {"propertyNames": {"maxLength": 1}},
    {"propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}},
    {"propertyNames": {"const": "a"}, "properties": {"a": {"type": "integer"}, "b": {}}},
    {"propertyNames": False},
    {"dependentRequired": {"a": ["b"]}},
    {"type": "object", "dependentRequired": {"a": ["b", "c"], "b": ["a"]}},
    {"dependentSchemas": {"a": {"properties": {"a": {"type": "integer"}}}}},
    {"$schema": OLD, "dependencies": {"a": ["b"], "k": {"required": ["n"]}}},
    {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"type": "integer"}},
    {"if": {"properties": {"k": {"const": "s"}}, "required": ["k"]}, "then": {"required": ["n"]}},
    {"if": {"minimum": 1}, "else": {"type": "null"}},
    {"then": {"type": "string"}},
    {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
    {"oneOf": [{"type": "number", "maximum": 0}, {"type": "number", "exclusiveMinimum": 0}]},
    {"oneOf": [{"enum": [1, "a"]}, {"const": 2}]},
    {"type": "object", "required": ["k"], "oneOf": [
        {"properties": {"k": {"const": "s"}}, "required": ["n"]},
        {"properties": {"k": {"const": "t"}}}]},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
    {"oneOf": [{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 2}]},
    {"not": {"type": ["string", "object", "number"]}},
    {"not": {"enum": ["a", "ab", 1, None, True]}},
    {"type": "string", "not": {"const": ""}},
    {"not": {"required": ["a"]}, "type": "object"},
    {"not": {"not": {"type": "string"}}},
    {"not": {"anyOf": [{"type": "number", "minimum": 1}, {"type": "string", "maxLength": 1}]}},
    {"type": "number", "not": {"minimum": 0.5}},
    {"$schema": OLD, "$ref": "#/definitions/a", "maxLength": 1,
     "definitions": {"a": {"type": "string"}}},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_rewritten_keywords_accept_exactly_the_valid_values(schema):
    matcher = compiled(schema)
    assert not matcher.is_error(), matcher.get_error()
    for value in VALUES:
        accepted = any(takes(matcher, text) for text in texts(value))
        assert accepted == valid(schema, value), value


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ({"contains": {"type": "integer"}}, "contains"),
        ({"uniqueItems": True, "type": "array"}, "uniqueItems"),
        ({"not": {"pattern": "a"}}, "not cannot be enforced because of pattern"),
        ({"if": {"items": {"type": "string"}}, "then": {"maxItems": 2}}, "if"),
        ({"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, "oneOf"),
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"propertyNames": {"format": "email", "pattern": "a", "minLength": 3}}, "propertyNames"),
        ({"const": "a\x00b"}, "control character in const"),
        ({"pattern": "^a\\x01$"}, "pattern"),
        ({"pattern": "^[\\x01]$"}, "pattern"),
        ({"not": {"$ref": "other.json"}}, "not cannot be enforced because of the reference"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(schema, names):
    with pytest.raises(RequestError, match=names) as refused:
        rewrite(schema)
    assert "\n" not in str(refused.value)


def test_no_escape_and_no_repeated_key_hides_a_property():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    matcher = compiled(schema | {"x-guidance": {"json_allowed_escapes": 'nu"'}})
    assert takes(matcher, '{"a": 1, "b": "x"}')
    for text in ('{"\\u0061": "x"}', '{"a": 1, "\\u0061": "x"}', '{"a": 1, "a": "x"}'):
        assert not takes(matcher, text), text


@given(st.sets(st.text('ab"\\\n.', max_size=3), min_size=1, max_size=4), st.text('ab"\\\n.'))
@settings(max_examples=25, deadline=None)
def test_patterns_of_names_match_these_names_or_all_others(names, other):
    for pattern, listed in ((one_of(names), True), (none_of(names), False)):
        matcher = compiled({"type": "string", "pattern": pattern})
        for text in [*names, other]:
            assert takes(matcher, json.dumps(text)) == ((text in names) == listed)


NUMBERS = st.sampled_from([-1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2])
SIZES = st.integers(0, 3)
NAMES = st.sampled_from(["a", "b", "ab"])
TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "b", "ab", '"', "\\"])
INSTANCES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)


def keywords(inner):
    """Schemas of up to three keywords over simpler schemas."""
    lists = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(NAMES, inner, max_size=2)
    every = {
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        "enum": st.lists(SCALARS, min_size=1, max_size=3), "const": INSTANCES,
        "pattern": st.sampled_from(['^[^"]{1,2}$', "^a", "[^\\\\]$", "^[^ab]*$", "b|^a"]),
        "format": st.just("path"), "items": inner, "prefixItems": lists, "properties": named,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "^b$"]), inner, max_size=1),
        "additionalProperties": inner, "required": st.lists(NAMES, max_size=2, unique=True),
        "anyOf": lists, "allOf": lists, "oneOf": lists, "not": inner, "if": inner, "then": inner,
        "else": inner, "uniqueItems": st.booleans(), "contains": inner,
        "propertyNames": st.sampled_from([{"enum": ["a"]}, {"pattern": "^a"}, {"maxLength": 1}]),
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True)),
        "dependentSchemas": named,
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), NUMBERS),
        **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength"), SIZES),
        **dict.fromkeys(("minProperties", "maxProperties"), SIZES),
        "multipleOf": st.sampled_from([0.5, 1, 2]),
    }  # fmt: skip
    pairs = st.sampled_from(sorted(every)).flatmap(lambda k: st.tuples(st.just(k), every[k]))
    return st.lists(pairs, max_size=3).map(dict)


SCHEMA = st.recursive(st.booleans() | TYPES.map(lambda t: {"type": t}), keywords, max_leaves=6)


@given(SCHEMA.filter(lambda s: isinstance(s, dict)), st.lists(INSTANCES, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_schema_accepts_what_jsonschema_accepts_or_is_refused(schema, instances):
    try:
        matcher = compiled(schema)
    except RequestError:
        return
    if matcher.is_error():  # the compiler's own refusal, or no value is valid
        assert matcher.get_error()
        return
    for value in [*instances, *VALUES[:20]]:
        accepted = any(takes(matcher, text) for text in texts(value))
        if accepted or "oneOf" not in json.dumps(schema):  # overlaps of oneOf may be left out
            assert accepted == valid(schema, value), value


JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner))


@given(st.dictionaries(st.sampled_from(sorted(KEYWORDS)), JSON, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_schemas_that_are_not_valid_are_refused_in_a_sentence(schema):
    try:
        outcome = rewrite(schema)
    except RequestError as refused:
        outcome = str(refused)
    assert "\n" not in outcome if isinstance(outcome, str) else isinstance(outcome, dict)

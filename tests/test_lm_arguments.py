"""Any argument of any type gives a result or one of our sentences, never an error from inside."""

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.errors import PacelineError
from paceline.models.chat import ChatTemplate
from paceline.request_options import RequestOptions
from tests.conftest import shared

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
SPECS = st.sampled_from(
    [
        "beam:width=2",
        "best_of:n=2",
        "top_p=0.9",
        "cfg:negative=No",
        "cfg",
        "key=a",
        "rejection",
        "start: /a+/",
        "user",
        "auto",
        "required",
        "{}",
        '{"type": "object"}',
        "planning",
        "Once upon a time",
    ]
)
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 600),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]),
    st.floats(),
    st.complex_numbers(),
    ANY_TEXT,
    SPECS,
    st.binary(max_size=4),
    st.builds(object),
    st.sampled_from([int, len, lambda x: x, pickle, Ellipsis, range(3), frozenset({1}), b"a"]),
    st.builds(np.array, st.lists(st.integers(-3, 600), max_size=3)),
    st.builds(np.array, st.lists(st.floats(), max_size=3)),
    st.builds(np.array, st.sampled_from([3, "a", None, 0.5])),
    st.builds(np.int64, st.integers(-3, 600)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(lambda n: (i for i in range(n)), st.integers(0, 3)),
)
KEYS = st.one_of(
    ANY_TEXT,
    st.integers(-3, 600),
    st.none(),
    st.sampled_from(["role", "content", "name", "parameters", "type", "function", "top_p", "dry"]),
)
ANYTHING = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=6,
)
OPTIONS = st.one_of(st.sampled_from(sorted(RequestOptions.__annotations__)), ANY_TEXT, SPECS)
CALLS = ("generate", "stream", "chat", "search", "score", "encode", "decode")


@pytest.fixture(scope="module")
def lm():
    with LM(shared("models", "stories260K"), drafter="lookup", budget=2, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def chat_lm():
    path = shared("models", "tinystories-instruct-3m-chat")
    with LM(path, drafter="plain", budget=0, threads=1) as opened:
        opened.tokenizer.template = ChatTemplate(TEMPLATE)
        yield opened


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ m.tool_calls | tojson }}\n"
    "{% if m.content == 'No' %}{{ raise_exception('not no') }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
MESSAGES = st.lists(
    st.dictionaries(KEYS, ANYTHING, max_size=2).map(lambda each: {"role": "user"} | each),
    min_size=1,
    max_size=3,
)
fuzzed = settings(suppress_health_check=list(HealthCheck))


def check_sentence(call):
    """Only our own errors, in one sentence that can be printed."""
    try:
        call()
    except PacelineError as error:
        sentence = str(error)
    else:
        return
    assert sentence.encode()
    assert "\n" not in sentence


def run(lm, call, argument, options):
    if call in ("encode", "decode", "score"):
        return getattr(lm, call)(argument)
    if call == "search":
        return lm.search(argument, options.pop("strategy", "beam:width=2"), **options)
    result = getattr(lm, call)(argument, **options)
    return result.run() if call == "stream" else result


@settings(fuzzed, max_examples=400)
@given(st.sampled_from(CALLS), ANYTHING)
def test_any_first_argument(lm, call, argument):
    check_sentence(lambda: run(lm, call, argument, {"max_new_tokens": 3}))


@settings(fuzzed, max_examples=600)
@given(st.sampled_from(("generate", "stream", "search")), OPTIONS, ANYTHING)
def test_any_option(lm, call, name, value):
    options = {"max_new_tokens": 3, "seed": 1} | {name: value}
    check_sentence(lambda: run(lm, call, "Once upon a time", options))


@settings(fuzzed, max_examples=100)
@given(OPTIONS, ANYTHING)
def test_any_option_of_a_list(lm, name, value):
    options = {"max_new_tokens": 3, "seed": 1} | {name: value}
    check_sentence(lambda: run(lm, "generate", ["Once", "Then"], options))


@settings(fuzzed, max_examples=200)
@given(MESSAGES, st.one_of(st.just([]), st.lists(ANYTHING, max_size=2)))
def test_any_messages_and_tools(chat_lm, messages, tools):
    check_sentence(lambda: chat_lm.chat(messages, tools=tools, max_new_tokens=2))


@settings(fuzzed, max_examples=200)
@given(st.one_of(ANYTHING, SPECS))
def test_any_strategy(lm, value):
    check_sentence(lambda: lm.search("Once upon a time", value, max_new_tokens=3))


@settings(fuzzed, max_examples=150)
@given(
    st.sampled_from(["model", "dtype", "engine", "drafter", "budget", "threads", "kv_format", "x"]),
    ANYTHING,
)
def test_any_argument_of_a_model(name, value):
    arguments = {"model": shared("models", "stories260K"), "drafter": "plain", "budget": 0}
    check_sentence(lambda: LM(**(arguments | {name: value})).close())

"""Tool calls in what models write: the syntax of each family, and text that only looks like it."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.structured import call_scanner, tool_calls
from paceline.control.structured.call_scanner import CallScanner
from paceline.control.structured.tool_calls import read_calls

FUNCTIONS = {
    "get": {"type": "object", "properties": {"x": {"type": "string"}, "n": {"type": "integer"}}},
    "clock": {},
}
GET = ("get", {"x": "Rome"})
CLOCK = ("clock", {})

# What models of each family write -> the calls in it, and the text beside them.
WRITTEN = {
    "hermes": (
        '<tool_call>\n{"name": "get", "arguments": {"x": "Rome"}}\n</tool_call>',
        [GET],
        "",
    ),
    "qwen, two calls": (
        '<tool_call>\n{"name": "get", "arguments": {"x": "Rome"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        [GET, CLOCK],
        "",
    ),
    "qwen, text before": (
        'I will look.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        [CLOCK],
        "I will look.",
    ),
    "hermes, no end tag": ('<tool_call>\n{"name": "clock", "arguments": {}}', [CLOCK], ""),
    "hermes, half an end tag": ('<tool_call>{"name": "clock"}\n</tool_ca', [CLOCK], ""),
    "hermes, no arguments": ('<tool_call>{"name": "clock"}</tool_call>', [CLOCK], ""),
    "hermes, null": ('<tool_call>{"name": "clock", "arguments": null}</tool_call>', [CLOCK], ""),
    "hermes, arguments in a string": (
        '<tool_call>{"name": "get", "arguments": "{\\"x\\": \\"Rome\\"}"}</tool_call>',
        [GET],
        "",
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=get>\n<parameter=x>\nRome\n</parameter>\n<parameter=n>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        [("get", {"x": "Rome", "n": 3})],
        "",
    ),
    "qwen3-coder, a number as text": (
        "<tool_call><function=get><parameter=x>12</parameter></function></tool_call>",
        [("get", {"x": "12"})],
        "",
    ),
    "smollm": ('<tool_call>[{"name": "get", "arguments": {"x": "Rome"}}]</tool_call>', [GET], ""),
    "granite": ('<|tool_call|>[{"name": "get", "arguments": {"x": "Rome"}}]', [GET], ""),
    "phi-4": ('<|tool_call|>[{"name": "clock", "arguments": {}}]<|/tool_call|>', [CLOCK], ""),
    "phi-4, functools": ('functools[{"name": "clock", "arguments": {}}]', [CLOCK], ""),
    "llama": ('{"name": "get", "parameters": {"x": "Rome"}}', [GET], ""),
    "llama, two": (
        '<|python_tag|>{"name": "get", "parameters": {"x": "Rome"}}; '
        '{"name": "clock", "parameters": {}}',
        [GET, CLOCK],
        "",
    ),
    "llama, custom": ('<function=get>{"x": "Rome"}</function>', [GET], ""),
    "llama 4": ('[get(x="Rome"), clock()]', [GET, CLOCK], ""),
    "mistral": ('[TOOL_CALLS] [{"name": "get", "arguments": {"x": "Rome"}}]', [GET], ""),
    "mistral, newer": ('[TOOL_CALLS]get[ARGS]{"x": "Rome"}[TOOL_CALLS]clock{}', [GET, CLOCK], ""),
    "gemma": ('```tool_code\nprint(get(x="Rome"))\n```', [GET], ""),
    "json in a fence": (
        'Of course.\n```json\n{"name": "get", "arguments": {"x": "Rome"}}\n```\n',
        [GET],
        "Of course.",
    ),
    "json after text": ('Of course.\n\n{"name": "clock", "arguments": {}}', [CLOCK], "Of course."),
    "openai's own": (
        '[{"type": "function", "function": {"name": "get", "arguments": "{\\"x\\": \\"Rome\\"}"}}]',
        [GET],
        "",
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n"
        '```json\n{"x": "Rome"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{}\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        [GET, CLOCK],
        "",
    ),
    "deepseek 3.1": (
        "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        [CLOCK],
        "Well.",
    ),
    "after reasoning": (
        '<think>I need the time.</think>\n<tool_call>{"name": "clock"}</tool_call>',
        [CLOCK],
        "<think>I need the time.</think>",
    ),
}
NO_CALLS = [
    "",
    '{"name": [1]}',
    '{"name": {"name": "clock"}}',
    '{"name": "unknown", "arguments": {}}',
    '{"name": "clock", "age": 3}',
    '{"name": "get", "arguments": {"x": NaN}}',
    '{"name": "get", "arguments": {"n": 1e999}}',
    '{"name": "get", "arguments": {"x": "\\ud800"}}',
    '{"name": "get", "arguments": [1]}',
    '{"name": "get", "arguments": "x"}',
    "[" * 100_000,
    '{"a":' * 50_000,
    'Use `<tool_call>{"name": "clock"}</tool_call>` for it.',
    'A model writes <tool_call>{"name": "clock"}</tool_call> to call.',
    '```\n<tool_call>{"name": "clock"}</tool_call>\n```\nis how a call looks.',
    '```json\n{"name": "clock", "arguments": {}}\n```\nis how a call looks.',
    '<think>Perhaps <tool_call>{"name": "clock"}</tool_call></think>No need.',
    '<think>\n<tool_call>{"name": "clock"}</tool_call>',
    'You would send {"name": "clock", "arguments": {}} to it.',
    '{"name": "clock", "arguments": {}}\nis how a call looks.',
    "[clock](http://example.org)",
    "[get(x=open('f'))]",
    "[get(*a, **b)]",
]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_models_write_is_read(name):
    text, calls, content = WRITTEN[name]
    assert read_calls(text, FUNCTIONS) == (content, calls)


@pytest.mark.parametrize("text", NO_CALLS, ids=lambda text: text[:30])
def test_what_only_looks_like_a_call_stays_text(text):
    assert read_calls(text, FUNCTIONS) == (text, [])


ODD = ["class", "print", "get-weather", "get.weather", "None", "1get", "get", "lambda", "a.class"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("form", ["[{}]", "```tool_code\n{}\n```", "```tool_code\nprint({})\n```"])
def test_names_that_python_does_not_take_are_called_as_others(name, form):
    functions = {each: {} for each in ODD}
    x = f"use {name}(a) or class=1, \u03c0\u03b10\u03c0\u03b1"
    said = f'{name}(x="{x}", class=[1, {{"in": (2,)}}])'
    text = form.format(said)
    wanted = {
        "x": f"use {name}(a) or class=1, \u03c0\u03b10\u03c0\u03b1",
        "class": [1, {"in": [2]}],
    }
    assert read_calls(text, functions) == ("", [(name, wanted)])
    assert [CallScanner(functions)(text[:cut]) for cut in range(1, len(text))] == [0] * (
        len(text) - 1
    )
    assert read_calls(text, {"another": {}}).calls == []


FRAGMENTS = [
    *(text for text, _, _ in WRITTEN.values()),
    *(text for text in NO_CALLS if len(text) < 1000),
    *("<tool", "_call>", "{", "}", "[", "]", '"name"', ":", '"get"', "\n", "`", "```", "```json\n"),
    *("<think>", "</think>", "text ", " ", "(", ")", "get(", "x=1", "[TOOL_", "CALLS]", "python"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=5).map("".join)


@given(TEXTS)
@settings(max_examples=400, deadline=None)
def test_any_text_gives_strict_json(text):
    content, calls = read_calls(text, FUNCTIONS)
    assert content in text or calls
    for call in calls:
        assert call.name in FUNCTIONS
        written = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
        assert json.loads(written.encode()) == call.arguments


@given(TEXTS, st.data())
@settings(max_examples=400, deadline=None)
def test_what_is_certain_stays(text, data):
    content = read_calls(text, FUNCTIONS).content
    cut = data.draw(st.integers(0, len(text)))
    certain = CallScanner(FUNCTIONS)(text[:cut])
    assert content.startswith(text[:certain])


@given(TEXTS, st.data())
@settings(max_examples=400, deadline=None)
def test_what_is_certain_of_a_growing_text_stays(text, data):
    content = read_calls(text, FUNCTIONS).content
    scan, cut, before = CallScanner(FUNCTIONS), 0, 0
    while cut < len(text):
        cut += data.draw(st.integers(1, 9))
        certain = scan(text[:cut])
        assert before <= certain
        assert content.startswith(text[:certain])
        before = certain


LONG = [
    *("word, word. ", "- [ ] task\n", "[ ] task\n", "[1,\n", '{"a":\n', "`a ", "```\n{", "[get(\n"),
    *(
        "<function=x>",
        "<function=get>",
        "<tool_call>",
        '["a\\\n',
        "<parameter=a>",
        "[print(\n",
        "[",
    ),
    'a <tool_call>{"name":"get"}</tool_call> b\n',
]


@pytest.mark.parametrize("part", LONG)
@pytest.mark.parametrize("end", ["", ")]", '"}]'])
def test_a_long_text_is_read_in_steps_in_proportion_to_its_length(part, end, monkeypatch):
    read = [0]

    class Decoder(json.JSONDecoder):
        def raw_decode(self, s, idx=0):
            try:
                value, stop = super().raw_decode(s, idx)
                read[0] += stop - idx
            except ValueError as error:
                read[0] += getattr(error, "pos", idx) - idx
                raise
            except RecursionError:
                read[0] += 1000
                raise
            return value, stop

    monkeypatch.setattr(tool_calls, "_decoder", Decoder())
    monkeypatch.setattr(call_scanner, "_decoder", Decoder())
    steps = [0]
    at = tool_calls.CallReader.at

    def counted(self, match):
        steps[0] += 1
        return at(self, match)

    monkeypatch.setattr(tool_calls.CallReader, "at", counted)
    parsed, parse = [0], ast.parse

    def measured(source, *words, **options):
        parsed[0] += len(source)
        return parse(source, *words, **options)

    monkeypatch.setattr(tool_calls.ast, "parse", measured)
    text = (part * 4000)[:16000] + end
    read_calls(text, FUNCTIONS)
    assert read[0] < 40 * len(text) + 300_000
    assert parsed[0] < 60_000
    read[0] = steps[0] = 0
    scan = CallScanner(FUNCTIONS)
    for cut in range(0, len(text) + 40, 40):
        scan(text[:cut])
    events = len(text) // 40
    assert steps[0] < 40 * events + len(text)
    assert read[0] < 3 * (events * len(text) / 2 + 40 * len(text) + 300_000)


def test_plain_text_is_not_held_back():
    text = "Here is [a list](of links), `code` and {braces}; {1: 2}.\n- [x] done\n```py\nf(1)\n"
    scan = CallScanner(FUNCTIONS)
    for cut in range(len(text) + 1):
        certain = scan(text[:cut])
        assert len(text[:cut].rstrip()) - certain <= len("- ```py")

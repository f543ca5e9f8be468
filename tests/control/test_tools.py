"""Tools: offered in the prompt, called by a grammar, found in the text."""

import json
import re
from contextlib import suppress

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import byte_level
from paceline import LM
from paceline.control.grammar import Grammar
from paceline.control.structured.tools import PLAIN, STYLES, ToolCall, Tools, style_of
from paceline.errors import PacelineError, RequestError
from paceline.models.chat import ChatTemplate
from paceline.models.tokenizer import open_tokenizer

pytest.importorskip("llguidance")

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"enum": [1, 2, 7]}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Rome", "Oslo", 'say "x"\\']}},
        },
    },
}
CLOCK = {"name": "clock"}
TOOLS = [WEATHER, CLOCK]
CALLS = [ToolCall("weather", {"city": "Rome", "days": 7}), ToolCall("clock", {})]
ALL = {"plain": PLAIN, **STYLES}


def written(call, style):
    content = {"name": call.name, style.arguments: call.arguments}
    return style.begin + json.dumps(content) + style.end


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="blend", budget=16, engine="native")


def use(lm, monkeypatch, source):
    template = ChatTemplate(source)
    monkeypatch.setattr(lm.tokenizer, "template", template)
    return template


TEMPLATES = {
    "plain": "{{ messages[-1].content }}",
    "hermes": "{{ tools }}{{ messages[-1].content }}<tool_call>",
    "llama": '{{ tools }}{{ messages[-1].content }}{"name": NAME, "parameters": ARGUMENTS}',
}


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", "weather", "clock"])
def test_what_must_be_called_is_called(lm, monkeypatch, style, choice):
    template = use(lm, monkeypatch, TEMPLATES[style])
    assert style_of(template.source) is ALL[style]
    finished = 0
    for seed in range(4):
        output = lm.generate(
            [{"role": "user", "content": "Once"}],
            tools=TOOLS,
            tool_choice=choice,
            temperature=1.0,
            seed=seed,
            controls={},
            max_new_tokens=160,
        )
        assert output.parsed is None
        assert output.tool_calls or output.finish == "length"
        finished += output.finish == "stop"
        text = output.text
        for call in output.tool_calls:
            assert choice in ("required", call.name)
            if call.name == "weather":
                jsonschema.validate(call.arguments, WEATHER["function"]["parameters"])
            else:
                assert call.arguments == {}
            assert text.startswith(written(call, ALL[style]))
            text = text[len(written(call, ALL[style])) :].removeprefix("\n")
        assert not text or output.finish == "length"
    assert finished


def test_tools_do_not_change_with_the_drafter(lm):
    plain = LM(drafter="plain", budget=0, engine="native")
    for seed in range(3):
        words = {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": seed}
        a, b = (each.generate("Once", **words) for each in (lm, plain))
        assert a.tokens == b.tokens
        assert a.tool_calls == b.tool_calls
        assert a.passes < b.passes


@pytest.mark.parametrize("style", ALL)
def test_calls_are_found_in_the_text(style):
    read = Tools.of(TOOLS).parser()
    calls = "\n".join(written(call, ALL[style]) for call in CALLS)
    assert read(calls) == (None, CALLS, "")
    assert read("") == (None, [], "")
    assert read("I will do it.") == (None, [], "I will do it.")
    if style == "hermes":  # each call by itself, the last one even where its end tag is cut
        assert read(calls[:-1]).tool_calls == CALLS
        assert read(calls.replace("weather", "whether")).tool_calls == CALLS[1:]
        assert read(f"Well, {calls} So!") == (None, CALLS, "Well, So!")
        assert read("<tool_call>{}</tool_call><tool_call>[</tool_call>").tool_calls == []
    else:  # all or none
        assert read(calls[:-1]).tool_calls == []
        assert read(calls.replace("weather", "whether")).tool_calls == []
        assert read(f"<|python_tag|>{calls.replace(chr(10), '; ')} ").tool_calls == CALLS
        assert read(f"Well, {written(CALLS[0], ALL[style])}").tool_calls == []
        assert read(f"Well:\n{calls}") == (None, CALLS, "Well:")


@given(st.text(max_size=30) | st.text('<tool_cal>/{}[]":,;nameu \n', max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_read(text):
    tools = Tools.of(TOOLS)
    for style in ALL.values():
        for each in (text, style.begin + text + style.end):
            assert all(call.name in tools.functions for call in tools.parser()(each).tool_calls)


def test_a_template_that_takes_tools_gets_them(lm, monkeypatch, tmp_path):
    seen = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ messages | length }}"
    )
    template = use(lm, monkeypatch, seen)
    assert template.takes_tools
    tools = Tools.of(TOOLS)
    found = tools.encode([{"role": "user", "content": "Once"}], lm.tokenizer)
    assert lm.tokenizer.decode(found).strip() == "weather;clock;1"
    assert template.render([], {}, ()) == "0", "no tools are none, as templates ask"


def test_a_template_that_takes_none_has_them_told(tmp_path):
    folder = byte_level(
        tmp_path, chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}"
    )
    tokenizer = open_tokenizer(folder)
    tools = Tools.of(TOOLS)
    for start in ([], [{"role": "system", "content": "Be kind."}]):
        messages = [*start, {"role": "user", "content": "Once"}]
        rendered = tokenizer.decode(tools.encode(messages, tokenizer))
        assert rendered.startswith("Be kind.\n\nYou can" if start else "You can")
        assert '"weather"' in rendered
        assert rendered.endswith("|Once|")
        assert start in ([], [{"role": "system", "content": "Be kind."}]), "not written to"


def test_none_offers_none(lm):
    request = lm.request("Once", tools=TOOLS, tool_choice="none")
    assert request == lm.request("Once")
    assert lm.request("Once", tools=TOOLS).controls == lm.request("Once").controls


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ({"name": "f"}, "auto", "expected a list of functions"),
        ("f", "auto", "expected a list of functions"),
        ([], "required", "0 tools"),
        ([{"name": f"f{i}"} for i in range(200)], "auto", "200 tools"),
        ([3], "auto", "tool 1 is not a function"),
        ([CLOCK, {"type": "function"}], "auto", "tool 2 is not a function"),
        ([{"name": "a b"}], "auto", "'a b'"),
        ([{"name": "none"}], "auto", "none of auto"),
        ([CLOCK, CLOCK], "auto", "two tools are called clock"),
        ([{"name": "f", "parameters": []}], "auto", "parameters of f"),
        ([{"name": "f", "parameters": {"type": "string"}}], "auto", "parameters of f"),
        ([{"name": "f", "description": 3}], "auto", "description of f"),
        ([CLOCK], "clok", "did you mean clock"),
        ([CLOCK], 3, "tool_choice"),
        ([CLOCK], {"type": "function"}, "tool_choice"),
        ([{"name": "f", "parameters": {"uniqueItems": 1}}], "f", "uniqueItems"),
    ],
)
def test_bad_tools_are_refused(lm, tools, choice, said):
    with pytest.raises(RequestError, match=said):
        lm.request("Once", tools=tools, tool_choice=choice)


def test_a_choice_may_be_as_the_api_has_it(lm):
    choice = {"type": "function", "function": {"name": "clock"}}
    output = lm.generate("Once", tools=TOOLS, tool_choice=choice)
    assert output.tool_calls == [ToolCall("clock", {})]


FORMS = {
    "schema": ({"schema": {"enum": [7, "/"]}}, r'7|"/"'),
    "regex": ({"grammar": Grammar("a\n|b/c|[/]\\/")}, r"a\n|b/c|//"),
    "choice": ({"grammar": Grammar.choice(["yes", "no / \\"])}, r"yes|no / \\"),
}


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_beside_tools_is_that_of_the_text(lm, monkeypatch, style, form):
    use(lm, monkeypatch, TEMPLATES[style])
    options, expected = FORMS[form]
    called = wrote = 0
    for seed in range(24):
        output = lm.generate(
            [{"role": "user", "content": "Once"}],
            tools=[CLOCK],
            temperature=100.0,
            seed=seed,
            controls={},
            max_new_tokens=80,
            **options,
        )
        if output.tool_calls:
            called += 1
            assert output.tool_calls[0] == ToolCall("clock", {})
            assert output.parsed is None
        elif output.finish == "stop":
            wrote += 1
            assert re.fullmatch(expected, output.text)
            assert form != "schema" or output.parsed == json.loads(output.text)
    assert called
    assert wrote


def test_a_form_is_not_written_where_a_call_is_forced(lm):
    for options, _ in FORMS.values():
        output = lm.generate("Once", tools=TOOLS, tool_choice="clock", **options)
        assert output.tool_calls == [ToolCall("clock", {})]


def test_rules_are_not_mixed_with_those_of_calls(lm):
    rules = Grammar('start: call\ncall: "a"', "lark")
    with pytest.raises(RequestError, match="rules cannot be mixed"):
        lm.request("Once", tools=TOOLS, grammar=rules)
    with pytest.raises(RequestError, match="rules cannot be mixed"):
        lm.request("Once", tools=TOOLS, grammar=Grammar("a"), schema={})


@pytest.mark.parametrize("marker", ["[TOOL_CALLS]", "<function=", "<\uff5ctool"])
def test_unknown_ways_to_write_calls_are_refused(lm, monkeypatch, marker):
    use(lm, monkeypatch, "{{ tools }}" + marker)
    with pytest.raises(RequestError, match="expected JSON"):
        lm.request("Once", tools=TOOLS)
    lm.request("Once", tools=TOOLS, tool_choice="none")


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "function", "parameters", "type", "properties", "$ref"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(JSONS, JSONS | st.sampled_from(["auto", "required"]))
@settings(max_examples=100, deadline=None)
def test_any_tools_work_or_are_refused(lm, tools, choice):
    with suppress(PacelineError):
        lm.generate("Once", tools=tools or (), tool_choice=choice, max_new_tokens=3)


def test_tools_and_calls_cannot_be_changed():
    tools = Tools.of([CLOCK])
    for value, name in ((tools, "choice"), (ToolCall("f", {}), "name"), (PLAIN, "begin")):
        with pytest.raises(AttributeError):
            setattr(value, name, "x")


def test_instructions_keep_the_characters_of_a_description():
    tools = Tools.of([{"name": "uhr", "description": "Zeit in Zürich 🕐"}])
    [message] = tools.with_tools([])
    assert "Zürich 🕐" in message["content"]
    first, second = tools.with_tools([{"role": "system", "content": "Kurz."}, {"role": "user"}])
    assert first["content"].startswith("Kurz.\n\nYou can call")
    assert second == {"role": "user"}


def test_a_request_has_one_to_128_tools():
    many = [{"name": f"f{number}"} for number in range(128)]
    assert len(Tools.of(many).functions) == 128
    for wrong in ([], [*many, {"name": "more"}]):
        with pytest.raises(RequestError, match="expected 1 to 128"):
            Tools.of(wrong)
    assert Tools.of([{"name": "f" * 64}]).functions
    with pytest.raises(RequestError, match="at most 64"):
        Tools.of([{"name": "f" * 65}])

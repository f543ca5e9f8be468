"""Messages as templates expect them: against transformers where it takes them, told where not."""

# ruff: noqa: E501 (templates keep their lines)

import json

import pytest

from paceline.models.chat import ChatTemplate

CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": {"x": 'é"1'}}}
TEXT_CALL = {**CALL, "function": {"name": "get", "arguments": json.dumps({"x": 'é"1'})}}
TOOLS = [{"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "Hi"}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "get", "content": "3"}
HISTORIES = {
    "plain": [USER],
    "system": [{"role": "system", "content": "Be kind."}, USER],
    "call": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    "call with text": [
        USER,
        {"role": "assistant", "content": "Well.", "tool_calls": [CALL]},
        RESULT,
    ],
    "two calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        RESULT,
        RESULT,
    ],
    "on": [USER, {"role": "assistant", "content": "Yes."}, USER],
}
# Templates in the ways of the open families, shortened.
TEMPLATES = {
    "chatml with calls": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama 3": """{% for m in messages %}{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}
{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}<|eot_id|>{% elif m.role == 'tool' %}
ipython: {{ m.content | tojson }}{% else %}{{ m.role }}: {{ m.content | trim }}{% endif %}{% endfor %}""",
    "mistral": """{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}[TOOL_CALLS][
{%- for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{% elif m.role == 'tool' %}
[TOOL_RESULTS]{{ m.content }}{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}""",
    "iterates": """{% for m in messages %}{{ m.role }}{{ m.content }}{% for c in m.tool_calls or [] %}
{%- for key, value in c.function.arguments.items() %}<{{ key }}>{{ value }}{% endfor %}{% endfor %}
{% endfor %}""",
    "thinks": """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | length if m.tool_calls }}
{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}""",
}


def with_text(messages):
    """The same history with arguments as text, as OpenAI's API has them."""
    return [
        {**m, "tool_calls": [TEXT_CALL] * len(m["tool_calls"])} if "tool_calls" in m else m
        for m in messages
    ]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["", "tools"])
def test_histories_render_as_in_transformers(template, history, tools):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source, messages = TEMPLATES[template], HISTORIES[history]
    expected, _ = utils.render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=True,
        tools=list(tools) or None,
    )
    mine = ChatTemplate(source)
    assert mine.render(messages, {}, tools) == expected[0]
    assert mine.render(with_text(messages), {}, tools) == expected[0]


def test_content_that_is_missing_is_empty():
    adds = ChatTemplate(
        "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] }}{% endfor %}"
    )
    for message in ({"role": "assistant"}, {"role": "assistant", "content": None}):
        assert adds.render([USER, message], {}) == "<user>Hi<assistant>"
    prints = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert prints.render([{"role": "assistant", "content": None}], {}) == "<>"


def test_a_template_without_calls_is_told_of_them():
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    said = template.render(with_text(HISTORIES["call with text"]), {})
    call = json.dumps({"name": "get", "arguments": {"x": 'é"1'}}, ensure_ascii=False)
    assert said == f"user: Hi\nassistant: Well.\n{call}\nuser: 3\n"


def test_a_named_template_is_for_tools():
    template = ChatTemplate("plain", tool_use="{{ tools | length }} tools")
    assert template.takes_tools
    assert template.render([USER], {}) == "plain"
    assert template.render([USER], {}, TOOLS) == "1 tools"


def test_settings_reach_the_template():
    template = ChatTemplate(TEMPLATES["thinks"])
    assert template.render([USER], {}, settings={"enable_thinking": False}).endswith(
        "<think></think>"
    )
    assert not template.render([USER], {}).endswith("<think></think>")

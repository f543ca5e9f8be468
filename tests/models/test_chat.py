"""Chat templates: rendered as transformers does, sandboxed, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from byte_tokenizer import byte_level
from paceline.errors import ModelError, RequestError
from paceline.models.chat import ChatTemplate, find_template
from paceline.models.tokenizer import open_tokenizer

CHATML = """{{ bos_token }}{% for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
<|{{ message.role }}|>
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [
    {"role": "system", "content": "Be kind. <é>"},
    {"role": "user", "content": "hi "},
]


def render(source: str, messages: list[dict[str, str]] | None = None) -> str:
    return ChatTemplate(source).render(messages or MESSAGES, {"bos_token": "<s>"})


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{% if tools is none and not documents %}{{ strftime_now('%Y') }}{% endif %}",
    ],
)
def test_renders_as_transformers(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = utils.render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source) == expected[0]


def test_template_refuses_messages() -> None:
    with pytest.raises(RequestError, match="unknown role robot"):
        render(CHATML, [{"role": "robot", "content": ""}])
    with pytest.raises(RequestError, match="refuses these messages"):
        render("{{ messages[0].content + 1 }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        render(source)


def test_where_templates_lie(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for settings, expected in (({"chat_template": "S"}, "S"), ({"chat_template": named}, "D")):
        template = find_template(tmp_path, settings)
        assert template is not None
        assert template.render(MESSAGES, {}) == expected
    with pytest.raises(ModelError, match="called default"):
        find_template(tmp_path, {"chat_template": named[:1]})
    (tmp_path / "chat_template.jinja").write_text("F")
    template = find_template(tmp_path, {"chat_template": "S"})
    assert template is not None
    assert template.render(MESSAGES, {}) == "F"


def test_chat_is_encoded_once(tmp_path: Path) -> None:
    """The template writes the first token itself, so none is added."""
    folder = byte_level(tmp_path, add_bos_token=True, bos_token="<s>", chat_template=CHATML)
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode_chat(MESSAGES)
    assert ids[0] == 256
    assert 256 not in ids[1:]
    assert ids == tokenizer.encode(tokenizer.render_chat(MESSAGES), special=False)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*chat_template\.jinja"):
        open_tokenizer(byte_level(tmp_path)).encode_chat(MESSAGES)
    assert json.loads(render("{{ messages | tojson }}")) == MESSAGES

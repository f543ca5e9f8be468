"""Chat templates: rendered as transformers does, sandboxed, and refused in one sentence."""

from __future__ import annotations

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from byte_tokenizer import byte_level
from paceline.errors import ModelError, RequestError
from paceline.models import chat
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


DOUBLING = (
    "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}"
)
MACROS = (
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
)
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "product": "{{ 'x' * 3000000000 }}",
    "product of a list": "{{ [1] * 3000000000 }}",
    "product at run time": "{{ messages[0].content * 3000000000 }}",
    "output in pieces": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "nested loops": LOOPS,
    "range": "{{ range(10 ** 12) | list | length }}",
    "center": "{{ 'x' | center(3000000000) }}",
    "ljust": "{{ 'x'.ljust(3000000000) }}",
    "indent": "{{ ('x\n' * 1000000) | indent(100000) }}",
    "format": "{{ '%3000000000d' % 1 }}",
    "format method": "{{ '{:>3000000000}'.format(1) }}",
    "join": "{{ ([messages[0].content * 1000000] * 100000) | join }}",
    "replace": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "doubling": DOUBLING + "{{ n.s | length }}",
    "power": "{{ 7 ** (7 ** 11) % 10 }}",
    "macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two macros": MACROS,
    "recursive loop": "{% for x in [[[1]]] recursive %}{{ loop([[[1]]]) }}{% endfor %}",
    "error": "{{ raise_exception('x' * 100000000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_one_sentence(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = ChatTemplate(HOSTILE[name])
    for _ in range(1 if name in ("nested loops", "two macros", "power") else 2):
        with pytest.raises(RequestError, match="the chat template") as caught:
            template.render(MESSAGES, {})
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000  # kB
    assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES, {}) == "Be kind. <é>"


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="writes more than 16777216 characters"):
        ChatTemplate(HOSTILE["output in pieces"]).render(MESSAGES, {})
    with pytest.raises(RequestError, match="needs more than 1024 MB"):
        ChatTemplate(HOSTILE["product"]).render(MESSAGES, {})
    with pytest.raises(RequestError, match="takes more than 2 seconds"):
        ChatTemplate(HOSTILE["nested loops"]).render(MESSAGES, {})
    monkeypatch.setattr(chat, "_WALL_SECONDS", 0.2)
    with pytest.raises(RequestError, match="takes more than 0 seconds"):
        ChatTemplate(HOSTILE["nested loops"]).render(MESSAGES, {})


def test_a_template_goes_on_after_its_process_ended() -> None:
    template = ChatTemplate("{{ messages[0].content * messages[0].n }}")
    assert template.render([{"content": "ab", "n": 2}], {}) == "abab"
    with pytest.raises(RequestError, match="MB"):
        template.render([{"content": "ab", "n": 3 * 10**9}], {})
    assert template.render([{"content": "ab", "n": 3}], {}) == "ababab"
    assert template._running is not None
    template._running._process.kill()
    with pytest.raises(RequestError, match="ends the process"):
        template.render([{"content": "ab", "n": 3}], {})
    assert template.render([{"content": "ab", "n": 1}], {}) == "ab"


def test_texts_of_any_kind_pass() -> None:
    template = ChatTemplate("{{ messages[0].content }}|{{ messages | length }}")
    text = "".join(map(chr, (0, 10, 13, 34, 0x7F, 0xE9, 0x1F600))) + "\ud800"
    assert template.render([{"content": text}], {}) == text + "|1"
    long = "word " * 400_000
    assert template.render([{"content": long}], {}) == long + "|1"
    with pytest.raises(RequestError, match="not JSON"):
        template.render([{"content": {1, 2}}], {})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 'x' | nothing }}", "no Filter 'nothing'"),
        ("{{ 'x' is nothing }}", "no Test 'nothing'"),
        ("{{ (", "not valid jinja2"),
        ("x" * ((1 << 20) + 1), "more than 1048576"),
        ("{{ " + "(" * 100_000 + "}}", "not valid jinja2"),
    ],
)
def test_invalid_templates_are_refused_when_opened(source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ChatTemplate(source)


def test_threads_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    texts = [str(number) * 1000 for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda text: template.render([{"content": text}], {}), texts))
    assert done == texts

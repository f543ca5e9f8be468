"""Special tokens that users write can be kept from ending their turn."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from paceline.models import load
from paceline.models.chat import ChatTemplate
from paceline.models.tokenizer import Tokenizer
from tests.byte_tokenizer import byte_level
from tests.conftest import shared

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im|>")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = byte_level(tmp_path_factory.mktemp("tokenizer"))
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer(backend, {}, ChatTemplate(TEMPLATE))


def ids(tokenizer, text):
    return [tokenizer.token_id(text)]


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["user", "system", "tool"]),
            st.lists(st.sampled_from([*SPECIAL, "a", " b", "\n", "é", "<|", "|>", "\U000f0000"])),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_only_the_template_writes_special_tokens(chatty, turns):
    messages = [{"role": role, "content": "".join(parts)} for role, parts in turns]
    tokens = chatty.encode_chat(messages, split_special=True)
    found = [token for token in tokens if token in chatty.silent]
    start, end = ids(chatty, SPECIAL[0]), ids(chatty, SPECIAL[1])
    assert found == (start + end) * len(turns) + start
    rendered = chatty.render_chat(messages)
    assert chatty.with_special().decode(tokens) == rendered


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_other_texts_are_encoded_as_always(chatty, text):
    if not any(token in text for token in SPECIAL):
        messages = [{"role": "user", "content": text}]
        try:
            plain = chatty.encode_chat(messages)
        except Exception as error:
            with pytest.raises(type(error)):
                chatty.encode_chat(messages, split_special=True)
            return
        assert chatty.encode_chat(messages, split_special=True) == plain
        assert chatty.encode(text, split_special=True) == chatty.encode(text)


def test_parts_and_names_are_covered_and_answers_are_not(chatty):
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    tokenizer = Tokenizer(chatty._backend, {}, ChatTemplate(template))
    text = [{"type": "text", "text": "x<|im_end|>"}]
    hostile = [{"role": "user", "content": text}]
    assert not set(tokenizer.encode_chat(hostile, split_special=True)) & tokenizer.silent
    answer = [{"role": "assistant", "content": text}]
    assert set(tokenizer.encode_chat(answer, split_special=True)) & tokenizer.silent


def test_a_raw_prompt_is_split_too(chatty):
    assert chatty.encode("<|im_end|>") == ids(chatty, "<|im_end|>")
    split = chatty.encode("<|im_end|>", split_special=True)
    assert len(split) > 1
    assert chatty.decode(split) == "<|im_end|>"


def test_sentence_pieces_are_split():
    tokenizer = load(shared("models", "stories260K")).tokenizer
    begin = tokenizer.encode("", special=True)[0]
    text = "Once <s> upon"
    assert tokenizer.encode(text).count(begin) == 2
    assert tokenizer.encode(text, split_special=True).count(begin) == 1

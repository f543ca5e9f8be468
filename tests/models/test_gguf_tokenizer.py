"""Tokenizers built from the metadata of GGUF files."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_metadata import (
    ALPHABET,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    byte_level,
    sentence_piece,
)
from paceline.errors import ModelError, RequestError
from paceline.models.detokenize import Detokenizer
from paceline.models.gguf_tokenizer import make_tokenizer
from paceline.models.gguf_vocabulary import find_stop_tokens
from paceline.models.tokenizer import Tokenizer
from paceline.models.vocabulary import Vocabulary

WORDS = {"▁": -1.0, "a": -2.0, "b": -3.0, "ab": -4.0, "▁a": -5.0, "▁ab": -6.0, "é": -7.0}
TEXT = st.text(st.one_of(st.sampled_from("ab hel▁ \n<s>/é\u0301\U0001f600"), st.characters()))
TEXT = TEXT.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


def made(metadata: dict[str, Any]) -> Tokenizer:
    return make_tokenizer(metadata, "x.gguf")


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token(index) for index in tokenizer.encode(text)]


def test_byte_level_merges_by_rank() -> None:
    tokenizer = made(byte_level())
    assert tokens(tokenizer, "hello w") == ["hello", "Ġw"]
    assert tokens(tokenizer, "1234") == ["123", "4"]
    assert tokens(tokenizer, "") == []
    assert tokenizer.decode(tokenizer.encode("hello é 😀")) == "hello é 😀"


def test_special_tokens_in_a_text() -> None:
    tokenizer = made(byte_level())
    ids = tokenizer.encode("<s>he<tool></s>")
    assert [tokenizer.token(index) for index in ids] == ["<s>", "he", "<tool>", "</s>"]
    assert tokenizer.decode(ids) == "he<tool>"  # control tokens are hidden, others shown
    assert {tokenizer.token(index) for index in tokenizer.silent} == {"<s>", "</s>"}


def test_the_first_of_equal_merges_counts() -> None:
    tokenizer = made(
        byte_level(["a b", "b c"]) | {"tokenizer.ggml.merges": [b"a b", b"b c", b"a b"]}
    )
    assert tokens(tokenizer, "abc") == ["ab", "c"]


def test_whole_tokens_ignore_merges_where_the_pre_tokenizer_says_so() -> None:
    metadata = byte_level(["a b"], {"<s>": CONTROL, "abc": NORMAL})
    assert tokens(made(metadata), "abc") == ["ab", "c"]
    llama3 = metadata | {"tokenizer.ggml.pre": "llama-bpe"}
    assert tokens(made(llama3), "abc") == ["abc"]


@pytest.mark.parametrize(
    ("pre", "values", "begins"),
    [
        ("gpt-2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("tekken", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
    ],
)
def test_defaults_of_bos(pre: str, values: dict[str, bool], begins: bool) -> None:
    bos = len(ALPHABET) + 1
    tokenizer = made(byte_level(["a b"], pre=pre, bos_token_id=bos, **values))
    assert tokenizer.encode("ab") == [bos] * begins + [256]
    assert tokenizer.encode("ab", special=False) == [256]


def test_bos_is_left_out_where_only_the_default_wants_it() -> None:
    assert made(byte_level(["a b"], pre="llama-bpe")).encode("ab") == [256]
    with pytest.raises(ModelError, match="is true, but bos_token_id"):
        made(byte_level(["a b"], add_bos_token=True))


def test_eos_is_appended_where_the_file_says_so() -> None:
    tokenizer = made(byte_level(["a b"], eos_token_id=258, add_eos_token=True))
    assert tokenizer.encode("ab") == [256, 258]


def test_pieces_merge_by_score_and_fall_back_to_bytes() -> None:
    tokenizer = made(sentence_piece(WORDS))
    assert tokens(tokenizer, "ab") == ["<s>", "▁ab"]
    assert tokens(tokenizer, "bä") == ["<s>", "▁", "b", "<0xC3>", "<0xA4>"]
    assert tokens(tokenizer, "") == ["<s>"]
    assert tokenizer.decode(tokenizer.encode("ab bä é")) == "ab bä é"
    assert len(tokenizer.byte_tokens) == 256


def test_the_space_before_a_text() -> None:
    prefixed = made(sentence_piece(WORDS, {"<x>": CONTROL}))
    assert tokens(prefixed, "a<x>a<s> a") == ["<s>", "▁a", "<x>", "▁a", "<s>", "▁", "▁a"]
    plain = made(sentence_piece(WORDS, {"<x>": CONTROL}, add_space_prefix=False))
    assert tokens(plain, "a<x>a<s> a") == ["<s>", "a", "<x>", "a", "<s>", "▁a"]
    assert plain.decode(plain.encode(" a")) == " a"
    assert prefixed.decode(prefixed.encode(" a")) == " a"
    assert Vocabulary(len(prefixed), prefixed).strips
    assert not Vocabulary(len(plain), plain).strips


def test_longer_tokens_are_found_first() -> None:
    added = {"aa": USER_DEFINED, "aaa": USER_DEFINED, "b": USER_DEFINED}
    pieces = {"▁": -1.0, "a": -2.0}
    tokenizer = made(sentence_piece(pieces, added, add_space_prefix=False))
    assert tokens(tokenizer, "aaaaab") == ["<s>", "aaa", "aa", "b"]
    assert tokens(tokenizer, "aaaa") == ["<s>", "aaa", "a"]


def test_phi_3_drops_spaces_behind_its_special_tokens() -> None:
    metadata = sentence_piece(WORDS, {"<|end|>": CONTROL}, add_space_prefix=False)
    named = metadata | {"general.name": "Phi-3 mini"}
    assert tokens(made(named), "a<|end|> \n a") == ["<s>", "a", "<|end|>", "a"]
    assert tokens(made(named), "<s> a") == ["<s>", "<s>", "▁a"]
    assert tokens(made(metadata), "a<|end|> a") == ["<s>", "a", "<|end|>", "▁a"]


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """Merge by score, slowly."""
    parts = list(text)
    while True:
        pairs = [
            (-scores[parts[i] + parts[i + 1]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in scores
        ]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text("ab", max_size=40), st.integers(0, 10**6))
def test_merging_equals_the_slow_one(text: str, seed: int) -> None:
    rng = random.Random(seed)
    pieces = {"a": -1.0, "b": -1.0}
    while len(pieces) < 12:  # equal scores are common: the leftmost pair goes first
        pieces["".join(rng.choices(list(pieces), k=2))] = float(rng.randint(-4, 0))
    tokenizer = made(sentence_piece(pieces, add_space_prefix=False, add_bos_token=False))
    assert tokens(tokenizer, text) == merged(text, pieces)


@settings(max_examples=200)
@given(TEXT)
def test_any_text_comes_back(text: str) -> None:
    for tokenizer in KINDS:
        ids = tokenizer.encode(text, special=False)
        stream = Detokenizer(tokenizer)
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)
        if not any(index in tokenizer.silent for index in ids):
            assert tokenizer.decode(ids) == text.replace("▁", " " if tokenizer.byte_tokens else "▁")
            pieces = Vocabulary(len(tokenizer), tokenizer).pieces
            joined = b"".join(pieces[index] for index in ids).decode()
            assert joined.removeprefix(" " * (tokenizer is KINDS[1] and bool(ids))) == (
                tokenizer.decode(ids)
            )


KINDS = (
    made(byte_level()),
    made(sentence_piece(WORDS)),
    made(sentence_piece(WORDS, add_space_prefix=False)),
)


def test_half_a_character_is_refused() -> None:
    for tokenizer in KINDS:
        with pytest.raises(RequestError, match="half a character"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "\n" * 100_000, "1" * 100_000])
def test_long_runs_take_no_long_time(text: str) -> None:
    for tokenizer in KINDS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [CHAT, CHAT.removeprefix("{{ bos_token }}")])
def test_a_chat_begins_with_one_bos(template: str) -> None:
    metadata = sentence_piece(WORDS) | {"tokenizer.chat_template": template}
    ids = made(metadata).encode_chat([{"role": "user", "content": "ab"}])
    assert [made(metadata).token(index) for index in ids] == ["<s>", "▁ab"]


def test_a_chat_begins_without_bos_where_none_is_added() -> None:
    template = CHAT.removeprefix("{{ bos_token }}")
    metadata = sentence_piece(WORDS, add_bos_token=False) | {"tokenizer.chat_template": template}
    assert made(metadata).encode_chat([{"role": "user", "content": "ab"}]) == [264]


def test_a_template_of_its_own_for_tools() -> None:
    metadata = sentence_piece(WORDS) | {
        "tokenizer.chat_template": CHAT,
        "tokenizer.chat_template.tool_use": "{{ tools | length }}" + CHAT,
    }
    tokenizer = made(metadata)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.render_chat(messages) == "<s>ab"
    assert tokenizer.render_chat(messages, [{"type": "function"}]) == "1<s>ab"


def test_stop_tokens_by_role_and_by_name() -> None:
    added = {
        "<|im_end|>": CONTROL,
        "<|endoftext|>": NORMAL,
        "<PAD>": USER_DEFINED,
        "</s>": NORMAL,
        "<EOT>": CONTROL,
    }
    metadata = byte_level([], added, eot_token_id=7)
    assert find_stop_tokens(metadata, "x.gguf") == {7, 256, 257, 260}
    assert made(metadata).silent == {256, 257, 260}
    assert find_stop_tokens(sentence_piece(WORDS), "x.gguf") == {2}


def test_messages_of_gpt_oss_end_no_answer() -> None:
    added = {"<|return|>": CONTROL, "<|call|>": CONTROL, "<|end|>": CONTROL}
    assert find_stop_tokens(byte_level([], added), "x.gguf") == {256, 257}


def test_unused_tokens_have_no_text() -> None:
    tokenizer = made(byte_level([], {"[PAD1]": UNUSED, "<s>": CONTROL}))
    assert tokenizer.silent == {256, 257}
    assert tokenizer.decode([256, *tokenizer.encode("a")]) == "a"
    assert Vocabulary(258, tokenizer).pieces[256:] == [b"", b""]
    assert 256 not in tokenizer.encode("[PAD1]")


def test_a_file_without_types_hides_the_tokens_with_roles() -> None:
    metadata = byte_level([], {"<s>": NORMAL, "</s>": NORMAL}, bos_token_id=256, eos_token_id=257)
    del metadata["tokenizer.ggml.token_type"]
    assert made(metadata).silent == {256, 257}


def with_tokens(metadata: dict[str, Any], change: dict[int, bytes]) -> dict[str, Any]:
    tokens = list(metadata["tokenizer.ggml.tokens"])
    for index, token in change.items():
        tokens[index] = token
    return metadata | {"tokenizer.ggml.tokens": tokens}


BPE, PIECES = byte_level(), sentence_piece(WORDS)
NAN = np.full(400, np.nan, np.float32)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "holds no tokenizer"),
        (BPE | {"tokenizer.ggml.tokens": []}, "holds no tokenizer"),
        (BPE | {"tokenizer.ggml.tokens": "abc"}, "tokens in x.gguf is 'abc'"),
        (BPE | {"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv', expected gpt2 or llama"),
        (BPE | {"tokenizer.ggml.model": 3}, "model in x.gguf is 3, expected text"),
        (BPE | {"tokenizer.ggml.pre": "qwen99"}, "needs the pre-tokenizer 'qwen99'"),
        ({k: v for k, v in BPE.items() if not k.endswith("pre")}, "does not name its pre-tok"),
        ({k: v for k, v in BPE.items() if not k.endswith("merges")}, "holds no merges"),
        (BPE | {"tokenizer.ggml.merges": [b"ab"]}, "has the merge b'ab'"),
        (BPE | {"tokenizer.ggml.merges": [b"a b c"]}, "has the merge b'a b c'"),
        (BPE | {"tokenizer.ggml.merges": [b"x y"]}, "is invalid"),
        (BPE | {"tokenizer.ggml.merges": [b"qq h"]}, "is invalid"),
        (BPE | {"tokenizer.ggml.merges": [b"\xff h"]}, "not UTF-8"),
        (BPE | {"tokenizer.ggml.merges": np.arange(3)}, "expected an array of strings"),
        (BPE | {"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "but 3 values of"),
        (BPE | {"tokenizer.ggml.token_type": np.ones(999, np.float32)}, "array of numbers"),
        (BPE | {"tokenizer.ggml.add_bos_token": 1}, "is 1, expected true or false"),
        (BPE | {"tokenizer.ggml.bos_token_id": "a"}, "expected a whole number"),
        (BPE | {"tokenizer.ggml.add_eos_token": True}, "eos_token_id names no token"),
        (BPE | {"tokenizer.chat_template": 3}, "chat_template in x.gguf is not text"),
        (BPE | {"tokenizer.chat_template": "{% for"}, "not valid jinja2"),
        (
            BPE | {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": 3},
            "is not text",
        ),
        (with_tokens(BPE, {5: b"\xff"}), "not UTF-8"),
        (with_tokens(BPE, {5: b"a" * 5000}), "up to 5000 bytes"),
        (with_tokens(BPE, {5: b"h"}), "has the token 'h' twice"),
        (with_tokens(PIECES, {260: b"\xff"}), "not UTF-8"),
        (with_tokens(PIECES, {260: b"\xc3", 261: b"\xa4"}), "not UTF-8"),
        (with_tokens(PIECES, {260: b"ab"}), "pieces 260 and 262 are equal"),
        (with_tokens(PIECES, {1: b"<" * 300}), "3 special tokens of 309 bytes, one of them 300"),
        (with_tokens(BPE, {265: b"<" * 300}), "one of them 300, expected at most"),
        (byte_level([], {f"<{i:0250}>": CONTROL for i in range(9000)}), "9000 special tokens"),
        (PIECES | {"tokenizer.ggml.scores": NAN}, "score of piece 0 is NaN"),
        (PIECES | {"tokenizer.ggml.scores": NAN[:9]}, "but 9 values of"),
        ({k: v for k, v in PIECES.items() if not k.endswith("scores")}, "is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        made(metadata)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_roles_out_of_range_are_as_absent() -> None:
    tokenizer = made(byte_level(bos_token_id=10**6, eos_token_id=-1))
    assert tokenizer.special == {}


def test_empty_tokens_have_the_name_that_llama_cpp_gives_them() -> None:
    tokenizer = made(with_tokens(byte_level([], {"x": NORMAL, "y": NORMAL}), {256: b"", 257: b""}))
    assert tokenizer.token(257) == "[EMPTY_257]"


def test_scores_may_be_infinite() -> None:
    scores = PIECES["tokenizer.ggml.scores"].copy()
    scores[262] = -np.inf
    tokenizer = made(PIECES | {"tokenizer.ggml.scores": scores})
    assert tokens(tokenizer, "bab") == ["<s>", "▁", "b", "ab"]


def test_bytes_without_a_token_are_unknown() -> None:
    metadata = with_tokens(PIECES, {3 + 0xC3: b"gone"})
    assert tokens(made(metadata), "ä") == ["<s>", "▁", "<unk>", "<0xA4>"]
    with pytest.raises(ModelError, match="no piece stands for byte 195"):
        made(metadata | {"tokenizer.ggml.unknown_token_id": 10**6})


@settings(max_examples=300)
@given(st.data())
def test_nonsense_makes_a_tokenizer_or_one_sentence(data: st.DataObject) -> None:
    names = st.sampled_from([b"", b"a", b"b", b"ab", b"\xff", b"<0x41>", b"\xe2\x96\x81", b"<s>"])
    tokens = data.draw(st.lists(st.one_of(names, st.binary(max_size=6)), max_size=12))
    number = st.one_of(st.integers(-2, 14), st.sampled_from([2**31, 2**63, -(2**40)]))
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": data.draw(st.sampled_from(["gpt2", "llama"])),
        "tokenizer.ggml.pre": data.draw(st.sampled_from(["gpt-2", "llama-bpe", "tekken"])),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(
            data.draw(st.lists(st.integers(-1, 7), min_size=12, max_size=12)), np.int32
        ),
        "tokenizer.ggml.scores": np.array(
            data.draw(st.lists(st.floats(width=32), min_size=12, max_size=12)), np.float32
        ),
        "tokenizer.ggml.merges": data.draw(
            st.lists(st.sampled_from([b"a b", b"b a", b"ab ab", b"a a", b" ", b"x"]), max_size=5)
        ),
    }
    for role in ("bos", "eos", "unknown", "eot"):
        if data.draw(st.booleans()):
            metadata[f"tokenizer.ggml.{role}_token_id"] = data.draw(number)
    try:
        tokenizer = made(metadata)
    except ModelError as error:
        message = str(error)
    else:
        message = ""
        check(tokenizer, metadata)
    assert "\n" not in message


def check(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    count = len(metadata["tokenizer.ggml.tokens"])
    ids = tokenizer.encode("ab <s>aab é")
    assert all(0 <= index < count for index in ids)
    assert isinstance(tokenizer.decode(ids), str)
    assert find_stop_tokens(metadata, "x.gguf") <= set(range(count))

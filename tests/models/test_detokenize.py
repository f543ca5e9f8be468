"""Streamed text: whole characters only, and all of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import byte_level
from paceline.models.detokenize import Detokenizer
from paceline.models.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import REAL_MODELS, shared

TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("a é 你好 🦊👩‍👩‍👧 \n")))


@cache
def real(name: str) -> Tokenizer:
    return open_tokenizer(shared("models", name))


def stream(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, before)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


def longest_run(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    runs = [0]
    for index in ids:
        if index not in tokenizer.silent:
            runs.append(runs[-1] + 1 if index in tokenizer.byte_tokens else 0)
    return max(runs)


@pytest.mark.parametrize("name", REAL_MODELS)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_text_comes_out_whole(name: str, text: str) -> None:
    tokenizer = real(name)
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", REAL_MODELS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_equal_their_decoding(name: str, data: st.DataObject) -> None:
    tokenizer = real(name)
    index = st.integers(0, len(tokenizer) - 1)
    ids = data.draw(st.lists(index, max_size=40).filter(lambda x: longest_run(tokenizer, x) < 16))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", REAL_MODELS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_goes_on_where_the_one_before_ends(name: str, data: st.DataObject) -> None:
    tokenizer = real(name)
    ids = tokenizer.encode(data.draw(TEXT.filter(lambda text: "\ufffd" not in text)))
    cut = data.draw(st.integers(0, len(ids)))
    before, after = ids[:cut], ids[cut:]
    said = tokenizer.decode(before).rstrip("\ufffd")
    if longest_run(tokenizer, ids) < 16:
        assert said + "".join(stream(tokenizer, after, before)) == tokenizer.decode(ids)


def test_the_space_between_a_prompt_and_its_output_is_kept() -> None:
    tokenizer = real("stories260K")
    before, after = tokenizer.encode("Once upon a"), tokenizer.encode("time", special=False)
    assert stream(tokenizer, after, before) == [" time", ""]
    assert stream(tokenizer, after) == ["time", ""]
    assert stream(tokenizer, after, tokenizer.encode("")) == ["time", ""]
    long = tokenizer.encode("你好" * 20)
    assert "".join(stream(tokenizer, after, [*long, *before[1:]])) == " time"
    assert "".join(stream(tokenizer, after, long)) == " time"


def test_characters_wait_for_their_bytes(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(byte_level(tmp_path))
    assert stream(tokenizer, tokenizer.encode("a🦊b")) == ["a", "", "", "", "🦊", "b", ""]


def test_unfinished_character_is_shown_at_the_end(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode("é")[:1]
    assert stream(tokenizer, ids) == ["", "\ufffd"]


def test_garbage_does_not_pile_up(tmp_path: Path) -> None:
    """A model that emits nothing but broken bytes is shown as such, in constant time a token."""
    tokenizer = open_tokenizer(byte_level(tmp_path))
    ids = tokenizer.encode("é")[1:] * 300
    detokenizer = Detokenizer(tokenizer)
    text = ""
    for index in ids:
        text += detokenizer.push(index)
        assert len(detokenizer._window) < 64
    assert text + detokenizer.flush() == tokenizer.decode(ids)


def test_long_byte_runs_are_not_held_back_for_ever() -> None:
    tokenizer = real("stories260K")
    pieces = stream(tokenizer, tokenizer.encode("你好" * 20))
    assert "".join(pieces) == "你好" * 20
    assert sum(map(bool, pieces)) > 5


class ByteDecoder:
    """Token i is byte i; some tokens are marked as byte tokens, token 256 is silent."""

    silent = frozenset({256})

    def __init__(self, byte_tokens: Sequence[int]) -> None:
        self.byte_tokens = frozenset(byte_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_run_of_byte_tokens_is_held_for_sixteen_tokens() -> None:
    pieces = stream(ByteDecoder([97]), [97] * 20)  # type: ignore[arg-type]
    assert pieces == [""] * 15 + ["a" * 16] + [""] * 4 + ["aaaa"]


def test_half_a_character_is_held_for_twenty_tokens() -> None:
    pieces = stream(ByteDecoder([]), [0xE4] * 22)  # type: ignore[arg-type]
    assert pieces[:19] == [""] * 19
    assert pieces[19] == "\ufffd" * 20
    assert "".join(pieces) == "\ufffd" * 22


def test_silent_tokens_give_no_text_and_nothing_is_flushed_twice() -> None:
    detokenizer = Detokenizer(ByteDecoder([97]))  # type: ignore[arg-type]
    assert [detokenizer.push(token) for token in (98, 256, 97)] == ["b", "", ""]
    assert detokenizer.flush() == "a"
    assert detokenizer.flush() == ""
    assert detokenizer.push(98) == "b"


def test_the_text_before_is_read_back_to_the_start_of_a_run_of_bytes() -> None:
    before = [98] * 10 + [97] * 30
    detokenizer = Detokenizer(ByteDecoder([97]), before)  # type: ignore[arg-type]
    assert len(detokenizer._window) == 31  # the run, and the token before it
    assert len(Detokenizer(ByteDecoder([]), before)._window) == 16  # type: ignore[arg-type]
    assert len(Detokenizer(ByteDecoder([]), [256, 98])._window) == 1  # type: ignore[arg-type]

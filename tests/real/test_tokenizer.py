"""The tokenizers of real GGUF files, against llama.cpp's own."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.llama_cpp import Library, LlamaCppTokenizer, installed
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.models.detokenize import Detokenizer
from paceline.models.formats.gguf import GGUFFile
from paceline.models.gguf_tokenizer import open_gguf_tokenizer
from paceline.models.tokenizer import Tokenizer
from paceline.models.vocabulary import Vocabulary
from tests.conftest import shared

TEXT = st.text(
    st.one_of(
        st.sampled_from(" \t\r\n'aAeéÉ1٣.,/<|>_▁क中の한$😀"),
        st.characters(exclude_categories=["Cs", "Cn", "Co"], exclude_characters="\0"),
    )
)
SAMPLES = [
    "",
    " ",
    "Hello  world, it's 12345 o'clock",
    "\n\n\n  leading and trailing  \t\n ",
    "<|im_start|>user\nHi<|im_end|>\n<start_of_turn>model\n<end_of_turn><bos><eos><unk>",
    "<|im_end|>   x <end_of_turn>  y<table><tr>\n\n<td>",
    "हिन्दी भाषा, 中文字, 日本語, 한국어, العربية, עברית, ไทย 😀👍🏽 \U0001f468\u200d\U0001f469",
    "def f(x):\n\treturn {'a': x ** 2}  # ½ of it\r\n",
    "a" * 3000,
    " " * 100 + "x" + " " * 40 + "\n" * 100 + "\t" * 70,
    "\u2581\u2581 \u2581a <0x0A> \ufeff\u200b\u00a0\u3000",
    "[multimodal]<start_of_image>[UNUSED] </s><s>",
]


@pytest.fixture(scope="module")
def file(path: Path) -> GGUFFile:
    return GGUFFile.open(path)


@pytest.fixture(scope="module")
def tokenizer(file: GGUFFile) -> Tokenizer:
    return open_gguf_tokenizer(file)


@pytest.fixture(scope="module")
def oracle(file: GGUFFile) -> Iterator[LlamaCppTokenizer]:
    if installed() is None:
        pytest.skip("llama.cpp is not here; `pip install xllamacpp`")
    opened = LlamaCppTokenizer(Library(), file.path)
    yield opened
    opened.close()


def data(*parts: str) -> list[str]:
    path = shared("data", *parts)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as opened:
        lines = opened.read().splitlines(keepends=True)
    return ["".join(lines[i : i + 50]) for i in range(0, min(len(lines), 3000), 50)]


def test_samples_have_the_ids_of_llama_cpp(tokenizer, oracle):
    for text in SAMPLES:
        for special in (True, False):
            assert tokenizer.encode(text, special) == oracle.encode(text, special)


@pytest.mark.parametrize(
    "parts",
    [
        ("mbpp", "mbpp.jsonl"),
        ("spec-bench", "question.jsonl"),
        ("gsm8k", "test.jsonl.gz"),
        ("wikitext-2", "valid.tokens.txt.gz"),
        ("cranfield", "cran.all.1400.gz"),
        ("jsonschemabench", "Github_trivial.jsonl.gz"),
    ],
    ids=lambda parts: parts[0],
)
def test_data_has_the_ids_of_llama_cpp(tokenizer, oracle, parts):
    for text in data(*parts):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text)
        if tokenizer.silent.isdisjoint(ids[1:]):
            assert tokenizer.decode(ids) == text


@settings(max_examples=500)
@given(text=TEXT)
def test_any_text_has_the_ids_of_llama_cpp(tokenizer, oracle, text):
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    stream = Detokenizer(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    pieces = Vocabulary(len(tokenizer), tokenizer).pieces
    for text in SAMPLES:
        ids = tokenizer.encode(text, special=False)
        if tokenizer.silent.isdisjoint(ids):
            joined = b"".join(pieces[index] for index in ids).decode()
            assert joined == tokenizer.decode(ids)
            assert joined.replace(" ", "▁") == text.replace(" ", "▁")


def test_every_token_has_the_bytes_of_llama_cpp(tokenizer, oracle):
    pieces = Vocabulary(len(tokenizer), tokenizer).pieces
    different = [token for token, piece in enumerate(pieces) if piece != oracle.piece(token)]
    # llama.cpp takes Gemma's tag for crossed-out text for the end of a text.
    assert [tokenizer.token(token) for token in different] in ([], ["</s>"])

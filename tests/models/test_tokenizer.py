"""Tokenizers of the five real checkpoints, and what tokenizer_config.json changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byte_tokenizer import byte_level
from paceline.errors import ModelError, RequestError
from paceline.models.tokenizer import open_tokenizer

TEXTS = ["Once upon a time", "a\n\n  b", 'The fox said: "no!"', ""]


def test_ids_are_those_of_transformers(real_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(real_model)
    tokenizer = open_tokenizer(real_model)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("a", special=False) == oracle.encode("a", add_special_tokens=False)


def test_bos_follows_the_settings(tmp_path: Path) -> None:
    plain = open_tokenizer(byte_level(tmp_path))
    both = open_tokenizer(
        byte_level(
            tmp_path,
            add_bos_token=True,
            add_eos_token=True,
            bos_token={"content": "<s>"},
            eos_token="</s>",
        )
    )
    ids = plain.encode("hi")
    assert both.encode("hi") == [256, *ids, 257]
    assert both.encode("hi", special=False) == ids
    assert both.decode([256, *ids, 257, 258]) == "hi"


def test_special_tokens_inside_text_are_special(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(byte_level(tmp_path))
    assert tokenizer.encode("</s>") == [257]


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": "1.0"}', "null"])
def test_broken_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="not a valid tokenizer"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": 3},
        {"add_bos_token": "yes"},
        {"chat_template": 5},
        {"chat_template": "{% if %}"},
    ],
)
def test_broken_settings(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        open_tokenizer(byte_level(tmp_path, **settings))


def test_fingerprints_tell_vocabularies_apart(tmp_path: Path) -> None:
    one = open_tokenizer(byte_level(tmp_path)).fingerprint()
    assert len(one) == 32
    assert open_tokenizer(byte_level(tmp_path, add_bos_token=False)).fingerprint() == one
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<pad>", "<none>"))
    assert open_tokenizer(tmp_path).fingerprint() != one


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="half a character"):
        open_tokenizer(byte_level(tmp_path)).encode("\ud83d")

"""The tokenizer that is stored in the metadata of a GGUF file.

Two kinds are known: `gpt2`, byte-level BPE with a list of merges and the name of a pre-tokenizer,
and `llama`, SentencePiece with scores and a token for each byte. Both give the ids of llama.cpp,
and what a file leaves open has llama.cpp's defaults.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from paceline.errors import ModelError, one_line
from paceline.models.chat import ChatTemplate
from paceline.models.formats.gguf import GGUFFile
from paceline.models.gguf_vocabulary import UNUSED, GGUFVocabulary
from paceline.models.pre_tokenizers import PreTokenizer, find_pre_tokenizer
from paceline.models.sentence_piece import SentencePieceBackend
from paceline.models.tokenizer import Tokenizer

_TEMPLATE = "tokenizer.chat_template"
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def open_gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Raises:
        ModelError: the file has none, one of an unknown kind, or an invalid one.
    """
    return make_tokenizer(file.metadata, str(file.path))


def make_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build a tokenizer from the metadata of a GGUF file; `where` is for error messages.

    Raises:
        ModelError: as `open_gguf_tokenizer`.
    """
    vocabulary = GGUFVocabulary(metadata, where)
    if vocabulary.kind == "gpt2":
        split = find_pre_tokenizer(vocabulary.text("pre"), where)
        add_bos = vocabulary.adds("bos", split.add_bos)
        backend: tokenizers.Tokenizer | SentencePieceBackend = _byte_level(vocabulary, split)
    elif vocabulary.kind == "llama":
        add_bos = vocabulary.adds("bos", True)
        backend = _sentence_piece(vocabulary)
    else:
        raise ModelError(
            f"{where} has a tokenizer of the kind {vocabulary.kind!r:.80}, expected gpt2 or llama; "
            "use the model's safetensors checkpoint with its tokenizer.json"
        )
    settings: dict[str, Any] = {
        name: vocabulary.decoded(index)
        for role, name in _ROLES.items()
        if (index := vocabulary.role(role)) is not None
    }
    settings |= {"add_bos_token": add_bos, "add_eos_token": vocabulary.adds("eos", False)}
    unused = frozenset(np.flatnonzero(vocabulary.types == UNUSED).tolist())
    return Tokenizer(backend, settings, _template(metadata, where), True, unused)


def _template(metadata: Mapping[str, Any], where: str) -> ChatTemplate | None:
    """Return the chat template; None without one. Of named ones `tool_use` is for tools."""
    source, tool_use = (metadata.get(key) for key in (_TEMPLATE, f"{_TEMPLATE}.tool_use"))
    if not isinstance(source, str | None) or not isinstance(tool_use, str | None):
        raise ModelError(f"{_TEMPLATE} in {where} is not text")
    return ChatTemplate(source, tool_use) if source else None


def _byte_level(vocabulary: GGUFVocabulary, split: PreTokenizer) -> tokenizers.Tokenizer:
    """Return byte-level BPE, whose tokens are written in GPT-2's printable characters."""
    where = vocabulary.where
    merges = vocabulary.strings("merges")
    if merges is None:
        raise ModelError(f"{where} holds no merges, which its tokenizer needs")
    try:
        with _garbage_collection_off():  # half a million small objects, none of them garbage
            texts = [token.decode() for token in vocabulary.tokens]
            ids = dict(zip(texts, count(), strict=False))
            pairs = [_pair(merge, where) for merge in dict.fromkeys(merges)]
            if len(ids) < len(texts):
                twice = next(text for index, text in enumerate(texts) if ids[text] != index)
                raise ModelError(f"{where} has the token {twice!r:.80} twice")
            model = models.BPE(ids, pairs, ignore_merges=split.ignore_merges)
    except UnicodeDecodeError as error:
        raise ModelError(f"{where} has tokens or merges that are not UTF-8: {error}") from None
    except ModelError:
        raise
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ModelError(f"the tokenizer of {where} is invalid: {one_line(error):.200}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    added = vocabulary.added().values()
    backend.add_special_tokens([token for token in added if token.special])
    backend.add_tokens([token for token in added if not token.special])
    return backend


def _pair(merge: bytes, where: str) -> tuple[str, str]:
    parts = merge.decode().split(" ")
    if len(parts) != 2:
        raise ModelError(f"{where} has the merge {merge!r:.80}, expected two tokens and a space")
    return parts[0], parts[1]


def _sentence_piece(vocabulary: GGUFVocabulary) -> SentencePieceBackend:
    try:
        return SentencePieceBackend(
            vocabulary.tokens,
            vocabulary.numbers("scores", "iuf").astype(np.float32),
            vocabulary.added(),
            vocabulary.role("unknown"),
            vocabulary.boolean("add_space_prefix", True),
        )
    except ModelError as error:
        raise ModelError(f"{vocabulary.where}: {error}") from None


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

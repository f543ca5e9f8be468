"""Metadata of GGUF files, small enough to write down: byte-level BPE and SentencePiece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ")


def byte_level(
    merges: Sequence[str] = MERGES,
    added: dict[str, int] | None = None,
    pre: str = "gpt-2",
    **values: Any,
) -> dict[str, Any]:
    """256 bytes, the result of each merge, then `added` tokens with their types."""
    added = {"<s>": CONTROL, "</s>": CONTROL, "<tool>": USER_DEFINED} if added is None else added
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in merges), *added]
    types = [NORMAL] * (len(tokens) - len(added)) + list(added.values())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [merge.encode() for merge in merges],
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }


def sentence_piece(
    pieces: dict[str, float], added: dict[str, int] | None = None, **values: Any
) -> dict[str, Any]:
    """`<unk>`, `<s>`, `</s>`, 256 bytes, `pieces` with their scores, `added` with their types."""
    added = {} if added is None else added
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *added]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), *added.values()]
    scores = [0.0] * 259 + list(pieces.values()) + [-1000.0] * len(added)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        **{f"tokenizer.ggml.{key}": value for key, value in values.items()},
    }

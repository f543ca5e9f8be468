"""The keys of a GGUF file that describe its tokenizer, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken

from paceline.errors import ModelError

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # of `token_type`
_LONGEST_TOKEN = 4096  # bytes; the longest of common models has 512
_MOST_TOKENS = 1 << 22
_LONGEST_ADDED = 256  # bytes of a token that is looked for in every text
_MOST_ADDED = 1 << 21  # bytes of all of them: finding them takes about 80 times as much memory
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # of the kind `llama`, where the file names none

# These end an answer whatever their type is: no text holds them by chance.
_ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|endoftext|> <|end_of_text|> "
    "<end_of_turn> <end_of_utterance> <|fim_pad|> <|fim_repo|> <|repo_name|> <|file_sep|> "
    "<｜end▁of▁sentence｜>".encode().split()
)
# These do if the file says that they are control tokens: they may be HTML or plain text.
_CONTROL_ENDS = frozenset(
    b"<EOT> _<EOT> [EOT] [EOS] <fim-pad> <fim_pad> <PAD> [PAD] <fim-repo> <REPO> <reponame>".split()
)
# Tokens of Phi-3 that do not take the spaces behind them along, as its others do.
_PHI3_KEEP = frozenset((b"<unk>", b"<s>", b"<|endoftext|>"))


class GGUFVocabulary:
    """The tokens of a file, their types and roles, and the settings of its tokenizer.

    Args:
        values: the metadata of the file.
        where: the file, for error messages.

    Attributes:
        kind: value of `tokenizer.ggml.model`.
        tokens: text of each token as the file writes it, [V].
        types: `token_type` of each, int64 [V]; without any, tokens with a role are control tokens.

    Raises:
        ModelError: the file has no tokens, or types that do not fit them.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self.where = where
        self.kind = self.text("model")
        tokens = self.strings("tokens")
        if not tokens:
            raise ModelError(f"{where} holds no tokenizer: {PREFIX}tokens is missing or empty")
        longest = max(map(len, tokens))
        if longest > _LONGEST_TOKEN or len(tokens) > _MOST_TOKENS:
            raise ModelError(
                f"{where} has {len(tokens)} tokens of up to {longest} bytes, expected at most "
                f"{_MOST_TOKENS} of {_LONGEST_TOKEN}"
            )
        if b"" in tokens:  # as in llama.cpp
            tokens = [token or b"[EMPTY_%d]" % index for index, token in enumerate(tokens)]
        self.tokens = tokens
        self.types = self._types()

    def role(self, role: str) -> int | None:
        """Return the id of a role, such as `bos`; None if there is none, or it is out of range."""
        value = self._values.get(f"{PREFIX}{role}_token_id")
        if value is None and self.kind == "llama":
            value = _LLAMA_IDS.get(role)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise self._wrong(f"{role}_token_id", "a whole number")
        return value if value is not None and 0 <= value < len(self.tokens) else None

    def adds(self, role: str, default: bool) -> bool:
        """Return whether `bos` is put before a text, or `eos` after it.

        Raises:
            ModelError: the file says so and does not say which token it is.
        """
        key = f"add_{role}_token"
        adds = self.boolean(key, default)
        if adds and self.role(role) is None:
            if PREFIX + key in self._values:
                raise ModelError(
                    f"{PREFIX}{key} in {self.where} is true, but {role}_token_id names no token"
                )
            return False
        return adds

    @cached_property
    def ends(self) -> dict[int, str]:
        """Tokens that end an answer by their name."""
        names = _ENDS | _CONTROL_ENDS
        named = [(index, token) for index, token in enumerate(self.tokens) if token in names]
        return {
            index: token.decode()
            for index, token in named
            if token in _ENDS or self.types[index] == CONTROL
        }

    def added(self) -> dict[int, AddedToken]:
        """Return the tokens that are found in a text as they are, by id; special ones are hidden.

        Raises:
            ModelError: one is not UTF-8 or too long, or all are.
        """
        special = np.isin(self.types, (UNKNOWN, CONTROL))
        special[list(self.ends)] = True
        name = str(self._values.get("general.name", "")).lower()
        phi3 = "phi-3" in name or "phi3" in name
        added = np.flatnonzero(special | (self.types == USER_DEFINED)).tolist()
        lengths = [len(self.tokens[index]) for index in added]
        if sum(lengths) > _MOST_ADDED or max(lengths, default=0) > _LONGEST_ADDED:
            raise ModelError(
                f"{self.where} has {len(added)} special tokens of {sum(lengths)} bytes, one of "
                f"them {max(lengths)}, expected at most {_MOST_ADDED} and {_LONGEST_ADDED}"
            )
        return {
            index: AddedToken(
                self.decoded(index),
                special=bool(special[index]),
                normalized=False,
                rstrip=phi3 and self.tokens[index] not in _PHI3_KEEP,
            )
            for index in added
        }

    def decoded(self, index: int) -> str:
        """Return the text of a token.

        Raises:
            ModelError: it is not UTF-8.
        """
        try:
            return self.tokens[index].decode()
        except UnicodeDecodeError:
            raise ModelError(f"token {index} of {self.where} is not UTF-8") from None

    def text(self, key: str) -> str | None:
        """Return a text; None if it is absent."""
        value = self._values.get(PREFIX + key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """Return a truth value."""
        value = self._values.get(PREFIX + key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def strings(self, key: str) -> list[bytes] | None:
        """Return an array of strings; None if it is absent."""
        value = self._values.get(PREFIX + key)
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, "an array of strings")
        return value

    def numbers(self, key: str, kinds: str) -> NDArray[Any]:
        """Return an array of a number for each token, of one of NumPy's `kinds`."""
        value = self._values.get(PREFIX + key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self._wrong(key, "an array of numbers")
        if len(value) < len(self.tokens):
            raise ModelError(
                f"{self.where} has {len(self.tokens)} tokens, but {len(value)} values of "
                f"{PREFIX}{key}"
            )
        return value[: len(self.tokens)]

    def _types(self) -> NDArray[np.int64]:
        if PREFIX + "token_type" in self._values:
            return self.numbers("token_type", "iu").astype(np.int64)
        types = np.full(len(self.tokens), NORMAL, np.int64)
        for role in ("bos", "eos", "padding"):
            if (index := self.role(role)) is not None:
                types[index] = CONTROL
        if (unknown := self.role("unknown")) is not None:
            types[unknown] = UNKNOWN
        return types

    def _wrong(self, key: str, expected: str) -> ModelError:
        value = self._values.get(PREFIX + key)
        shown = f"{value!r:.80}" if isinstance(value, str | int | float) else type(value).__name__
        return ModelError(
            f"{PREFIX}{key} in {self.where} is {'missing' if value is None else shown}, "
            f"expected {expected}"
        )


def find_stop_tokens(metadata: Mapping[str, Any], where: str) -> frozenset[int]:
    """Return the ids that end an answer, by their roles and by their names.

    Many files of chat models name the `eos` of their base model. As in llama.cpp, but `</s>` never
    counts by its name, and names such as `<PAD>` only where the file calls them control tokens:
    Gemma and Qwen have `</s>` for HTML.

    Args:
        metadata: of a GGUF file.
        where: the file, for error messages.

    Raises:
        ModelError: the tokens are missing or invalid.
    """
    vocabulary = GGUFVocabulary(metadata, where)
    roles = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    ends = vocabulary.ends
    if {"<|return|>", "<|call|>"} <= set(ends.values()):
        # gpt-oss ends messages, not answers, by <|end|>.
        ends = {index: text for index, text in ends.items() if text != "<|end|>"}
    ids = (vocabulary.role(role) for role in roles)
    return frozenset(index for index in ids if index is not None) | ends.keys()

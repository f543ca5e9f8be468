"""Log-probabilities of tokens in OpenAI's formats, whole or streamed."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paceline.core import Request
from paceline.errors import MethodError
from paceline.serving.messages import Logprob

if TYPE_CHECKING:
    from paceline.lm import LM


class TokenTexts:
    """The texts of tokens one after the other, and where each begins.

    The bytes of a token are those of its piece in the vocabulary, so that the bytes of all tokens
    are the text; special tokens have none and are called by their names.

    Args:
        lm: knows the tokens.
        begins: whether the first token begins a text; a leading space is dropped then where the
            tokenizer adds one.
        special: ids of special tokens that are part of the text.
    """

    def __init__(self, lm: LM, begins: bool, special: frozenset[int] = frozenset()) -> None:
        self._lm = lm
        self._strips = begins and lm.vocabulary.strips
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length, self._special = 0, special
        self._bytes = token_bytes(lm)

    def piece(self, token: int) -> bytes:
        """Return the bytes of the token if it comes next."""
        if token in self._special:
            return self._lm.tokenizer.token(token).encode()
        if self._bytes is None:  # a decoder whose tokens have no text of their own
            return self._lm.tokenizer.decode([token]).encode()
        own = self._bytes[token] if token < len(self._bytes) else b""
        return own[1:] if self._strips and own.startswith(b" ") else own

    def text(self, token: int) -> str:
        """Return the text of the token if it comes next; parts of characters as escaped bytes."""
        own = self.piece(token)
        if not own:
            return self._lm.tokenizer.token(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def push(self, token: int) -> int:
        """Go on past the token; return how many characters of the text are before it."""
        offset, own = self._length, self.piece(token)
        self._length += len(self._decoder.decode(own))
        self._strips = self._strips and not own
        return offset


def texts_of(request: Request, lm: LM) -> TokenTexts:
    """Return the texts of a request's output."""
    kept = lm.tokenizer.silent - request.stop_tokens if request.keep_special else frozenset()
    return TokenTexts(lm, begins=not request.continues, special=kept)


def completion_logprobs(logprobs: Sequence[Logprob], texts: TokenTexts) -> dict[str, Any]:
    """Return log-probabilities in the format of completions; `texts` goes on past the tokens."""
    tokens, tops, offsets = [], [], []
    for each in logprobs:
        tokens.append(texts.text(each.token))
        top: dict[str, float] = {}
        for token, logprob in each.top:
            name = texts.text(token)
            top[f"token_id:{token}" if name in top else name] = logprob
        tops.append(None if each.logprob is None else top)
        offsets.append(texts.push(each.token))
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def chat_logprobs(logprobs: Sequence[Logprob], texts: TokenTexts) -> dict[str, Any]:
    """Return log-probabilities in the format of chat; `texts` goes on past the tokens."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": texts.text(token),
            "logprob": logprob,
            "bytes": list(texts.piece(token)),
        }

    content = []
    for each in logprobs:
        entry = one(each.token, each.logprob)
        content.append(entry | {"top_logprobs": [one(*top) for top in each.top]})
        texts.push(each.token)
    return {"content": content}


def token_bytes(lm: LM) -> list[bytes] | None:
    """Return the bytes of each token; None where tokens have none of their own.

    The first call of a model takes a tenth of a second for 50,000 tokens: make it in a thread.
    """
    try:
        return lm.vocabulary.pieces
    except MethodError:
        return None

"""Encodes and decodes text with the tokenizer of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import tokenizers

from paceline.errors import ModelError, RequestError, one_line
from paceline.models.chat import ChatTemplate, find_template
from paceline.models.fields import Fields, read_json
from paceline.models.plain_text import Backend, MarkedMessages, without_special
from paceline.models.sentence_piece import SentencePieceBackend

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class WithSpecialTokens:
    """Decodes tokens to text, special tokens to what they are called.

    Args:
        backend: decodes texts between special tokens.
        byte_tokens: ids that stand for one byte each.
    """

    silent: frozenset[int] = frozenset()

    def __init__(
        self,
        backend: Backend,
        byte_tokens: frozenset[int],
    ) -> None:
        self._backend, self.byte_tokens = backend, byte_tokens

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        if isinstance(self._backend, SentencePieceBackend):
            return self._backend.decode(ids)
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def with_special(self) -> WithSpecialTokens:
        """Return this decoder."""
        return self


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: turns text into ids and back.
        settings: as in tokenizer_config.json: special tokens by role, `add_bos_token` and
            `add_eos_token`.
        template: the chat template; None without one.
        chat_begins: whether a conversation begins with the token that begins a text where the
            template does not write it, as in llama.cpp.
        hidden: further ids that have no text.

    Attributes:
        special: special tokens by role, e.g. `{"bos_token": "<s>"}`.
        silent: ids of special and hidden tokens, which decoding skips.
        byte_tokens: ids that stand for one byte each, if the tokenizer falls back to bytes.
        template: the chat template; None without one.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Mapping[str, Any] | None = None,
        template: ChatTemplate | None = None,
        chat_begins: bool = False,
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._backend = backend
        self.template = template
        fields = Fields(settings or {}, "tokenizer_config.json")
        self.special = {role: text for role in _SPECIAL if (text := _text(fields, role))}
        # As in transformers, these settings take the place of the post-processor's special tokens.
        self._explicit = fields.has_key("add_bos_token") or fields.has_key("add_eos_token")
        self._begin = self._ids("bos_token") if fields.boolean("add_bos_token") else []
        self._end = self._ids("eos_token") if fields.boolean("add_eos_token") else []
        self._chat_begin = self._begin if chat_begins else []
        self.byte_tokens = _byte_tokens(backend)
        # By id: the decoder's own way, by text, misses special tokens that were normalised.
        added = backend.get_added_tokens_decoder()
        self.silent = hidden | {index for index, token in added.items() if token.special}
        self._special_texts = [token.content for token in added.values() if token.special]

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def _plain(self) -> Backend:
        return without_special(self._backend)

    def encode(self, text: str, special: bool = True, split_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: in which special tokens are found, as in transformers.
            special: the tokens that begin or end a text are added.
            split_special: special tokens in the text are text.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        added = special and not self._explicit
        backend = self._plain if split_special else self._backend
        try:
            ids: list[int] = backend.encode(text, add_special_tokens=added).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError("the text holds half a character (a lone surrogate)") from None
        return [*self._begin, *ids, *self._end] if special else ids

    def encode_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        split_special: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation, ready for the model's answer.

        Args:
            messages: `role` and `content` of each turn.
            tools: for a template that takes them.
            settings: further variables of the template, e.g. `enable_thinking`.
            split_special: special tokens in the messages of users, tools and systems are text.

        Raises:
            RequestError: the model has no chat template, or its template refuses the messages.
        """
        [ids] = self.encode_chat_parts(messages, tools, settings, split_special)
        return ids

    def encode_chat_parts(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
        split_special: bool = False,
        mark: str | None = None,
    ) -> list[list[int]]:
        """Return the token ids of a conversation in parts, encoded apart, that a mark separates.

        Args:
            messages: as of `encode_chat`.
            tools: likewise.
            settings: likewise.
            split_special: likewise.
            mark: text in the messages that is left out; None: there is one part.

        Raises:
            RequestError: as `encode_chat`.
        """
        encode = partial(self.encode, special=False)
        if split_special:
            marked = MarkedMessages(list(messages), self._special_texts)
            text = self.render_chat(marked.messages, tools, settings)
            plain = partial(self.encode, special=False, split_special=True)
            encode = partial(marked.encode, with_special=encode, plain=plain)
        else:
            text = self.render_chat(messages, tools, settings)
        parts = [encode(part) for part in ([text] if mark is None else text.split(mark))]
        if parts[0][: len(self._chat_begin)] != self._chat_begin:
            parts[0] = [*self._chat_begin, *parts[0]]
        return parts

    def render_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the answer begins."""
        if self.template is None:
            raise RequestError(
                "this model has no chat template; give it plain text, or put its template into "
                "chat_template.jinja beside its config.json"
            )
        return self.template.render(list(messages), self.special, tools, settings)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return self._backend.decode([index for index in ids if index not in self.silent])

    def with_special(self) -> WithSpecialTokens:
        """Return a decoder that keeps special tokens."""
        return WithSpecialTokens(self._backend, self.byte_tokens)

    def fingerprint(self) -> bytes:
        """Return 32 bytes that identify this vocabulary."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        listed = sorted((index, token) for token, index in vocabulary.items())
        return sha256(repr(listed).encode()).digest()

    def token(self, index: int) -> str:
        """Return one token as the vocabulary writes it; empty if there is none."""
        return self._backend.id_to_token(index) or ""

    def decoder(self) -> dict[str, Any] | None:
        """Return the decoder, as tokenizer.json describes it."""
        decoder = self._backend.decoder
        if decoder is None:
            return None
        described: dict[str, Any] = json.loads(decoder.__getstate__())
        return described

    def to_json(self) -> str:
        """Return the tokenizer.json; empty where the tokenizer has none, as SentencePiece."""
        return self._backend.to_str() if isinstance(self._backend, tokenizers.Tokenizer) else ""

    def token_id(self, text: str) -> int | None:
        """Return the id of a token as the vocabulary writes it; None if there is none."""
        index: int | None = self._backend.token_to_id(text)
        return index

    def special_id(self, role: str) -> int | None:
        """Return the id of a special token, e.g. of `bos_token`; None if there is none."""
        return self.token_id(self.special[role]) if role in self.special else None

    def _ids(self, role: str) -> list[int]:
        index = self.special_id(role)
        return [] if index is None else [index]


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint.

    Raises:
        ModelError: tokenizer.json is missing or invalid.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; load its tokenizer in transformers and save it again "
            "with save_pretrained"
        )
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a valid tokenizer: {one_line(error):.200}") from None
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    return read_tokenizer(text, str(path), settings, find_template(folder, settings))


def read_tokenizer(
    text: str,
    where: str,
    settings: Mapping[str, Any] | None = None,
    template: ChatTemplate | None = None,
) -> Tokenizer:
    """Build a tokenizer from the content of a tokenizer.json.

    Args:
        text: the content.
        where: the file, for error messages.
        settings: those of tokenizer_config.json.
        template: the chat template.

    Raises:
        ModelError: the content is invalid.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ModelError(f"{where} is not a valid tokenizer: {one_line(error):.200}") from None
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, settings, template)


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Return whether two vocabularies agree on all common ids; one may be padded."""
    return all(a.token(i) == b.token(i) for i in range(min(len(a), len(b))))


def _text(fields: Fields, role: str) -> str | None:
    """Return a special token, given as a string or as an object with `content`."""
    value = fields.get(role)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise fields.fail(role, "a string")
    return value


def _byte_tokens(backend: tokenizers.Tokenizer | SentencePieceBackend) -> frozenset[int]:
    if "ByteFallback" not in repr(backend.decoder):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(index for index in ids if index is not None)

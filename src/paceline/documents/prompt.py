"""Where documents stand in a prompt, and which tokens they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.arguments import check_items, check_text, wrong
from paceline.errors import RequestError
from paceline.models.tokenizer import Tokenizer

MAX_DOCUMENTS = 256
_MARK = "\U0010fffddocuments\U0010fffd"  # stands in a conversation where the documents go
_EXPECTED = 'a list of texts, or of mappings such as {"title": "Notes", "text": "..."}'


def document_texts(name: str, value: object) -> tuple[str, ...]:
    """Return the texts of documents, each with its title and the space that ends it.

    Args:
        name: of the option, for errors.
        value: texts, or mappings with `text` and perhaps `title`.

    Raises:
        RequestError: one is something else or empty, or there are more than `MAX_DOCUMENTS`.
    """
    if isinstance(value, str | Mapping):
        raise wrong(name, value, _EXPECTED)
    items = check_items(name, value, _EXPECTED)
    if len(items) > MAX_DOCUMENTS:
        raise RequestError(f"{name} has {len(items)} texts, expected {MAX_DOCUMENTS} or fewer")
    return tuple(_text(f"document {number}", item) for number, item in enumerate(items, 1))


def _text(name: str, item: object) -> str:
    title = ""
    if isinstance(item, Mapping):
        if unexpected := sorted(str(key) for key in item if key not in ("title", "text")):
            raise RequestError(f"{name} has a field {unexpected[0]!r:.40}, expected text and title")
        title = check_text(f"the title of {name}", item.get("title") or "")
        item = item.get("text")
    text = check_text(name, item, "text, or a mapping with text and title")
    if not text.strip():
        raise RequestError(f"{name} is empty, expected some text")
    return f"{title}\n{text}\n\n" if title else f"{text}\n\n"


def sink_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token that stands before a document while it is computed.

    That which begins a text, or else ends one: models attend to it where they attend to nothing.
    """
    for role in ("bos_token", "eos_token"):
        index = tokenizer.special_id(role)
        if index is not None:
            return (index,)
    return (0,)


def around_text(
    tokenizer: Tokenizer, text: str, split_special: bool
) -> tuple[list[int], list[int]]:
    """Return the tokens before documents, those that begin every text, and behind them `text`."""
    whole = tokenizer.encode(text, split_special=split_special)
    plain = tokenizer.encode(text, False, split_special)
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin], whole[begin:]
    return [], plain


def around_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the tokens before documents, the one that begins a text, and those behind them."""
    begins = tokens[:1] == [tokenizer.special_id("bos_token")] and len(tokens) > 1
    return list(tokens[:begins]), list(tokens[begins:])


def around_messages(
    messages: Sequence[Mapping[str, Any]],
    encode: Callable[[Sequence[Mapping[str, Any]], str], list[list[int]]],
) -> tuple[list[int], list[int]]:
    """Return the tokens before and behind documents that stand before the last user's message.

    Args:
        messages: a conversation.
        encode: encodes a conversation in parts that a mark separates.

    Raises:
        RequestError: there is no such message, or the template does not show it once.
    """
    places = [index for index, each in enumerate(messages) if each.get("role") == "user"]
    if not places:
        raise RequestError("documents stand in the message of a user, and there is none; add one")
    last = messages[places[-1]]
    content = last.get("content")
    if not isinstance(content, str):
        raise wrong("the message that documents stand in", content, "text")
    marked = [*messages]
    marked[places[-1]] = {**last, "content": _MARK + content}
    parts = encode(marked, _MARK)
    if len(parts) != 2:
        raise RequestError(
            f"the chat template shows the last user's message {len(parts) - 1} times, so that "
            "documents have no place; give them as part of the message"
        )
    return parts[0], parts[1]

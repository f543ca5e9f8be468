"""Conversations in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paceline.cli.conversation.transcript import Transcript
from paceline.cli.output import save
from paceline.errors import RequestError

SCHEMA = "paceline-chat/1"
_FIELDS = ("schema", "model", "system", "messages")
_LARGEST = 64 << 20  # bytes
_ROLES = ("user", "assistant")


def path_of(text: str) -> Path:
    """Return the path that `/save` or `/load` names.

    Raises:
        RequestError: there is none, or no file can be called so.
    """
    if not text:
        raise RequestError("no file is named; write e.g. /save talk.json")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(f"{text!r:.80} cannot be a file: {error!s:.80}") from None
    if "\0" in text:
        raise RequestError(f"{text!r:.80} cannot be a file: it has a null character")
    return path


def save_talk(path: Path, talk: Transcript, model: str) -> None:
    """Write a conversation, under a temporary name first.

    Raises:
        PacelineError: the file cannot be written, or holds something else.
    """
    if path.is_file() and path.stat().st_size:
        try:
            read_talk(path)
        except RequestError:
            raise RequestError(
                f"{path} exists and is no saved conversation; choose another name"
            ) from None
    messages = Transcript(turns=talk.turns).messages()
    save(path, {"schema": SCHEMA, "model": model, "system": talk.system, "messages": messages})


def read_talk(path: Path) -> tuple[Transcript, str]:
    """Read a conversation; nothing of the file is trusted.

    Returns:
        the conversation, and the name of the model that it was held with.

    Raises:
        RequestError: the file cannot be read, or is no conversation.
    """
    if not path.exists():
        raise RequestError(f"there is no file {path}")
    if not path.is_file():
        raise RequestError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise RequestError(f"{path} has more than {_LARGEST >> 20} MB, too many for a talk")
        found = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error!s:.100}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise RequestError(f'{path} is no saved conversation, expected "schema": "{SCHEMA}"')
    for name in found:
        if name not in _FIELDS:
            raise RequestError(f"{path} has an unknown field {name!r:.40}")
    system, model = found.get("system"), found.get("model", "")
    if system is not None:
        system = _text(path, "system", system)
    turns = _turns(path, found.get("messages"))
    return Transcript(system=system or None, turns=turns), _text(path, "model", model)


def _turns(path: Path, messages: Any) -> list[tuple[str, str]]:
    """Return the turns of messages, which alternate between user and assistant."""
    if not isinstance(messages, list) or len(messages) % 2:
        raise RequestError(f"{path} has no list of messages, each with its answer")
    texts = []
    for number, message in enumerate(messages):
        role = _ROLES[number % 2]
        if (
            not isinstance(message, dict)
            or set(message) != {"role", "content"}
            or message["role"] != role
        ):
            raise RequestError(
                f"message {number + 1} of {path} is not a role and a content, with role {role}"
            )
        texts.append(_text(path, f"message {number + 1}", message["content"]))
    return list(zip(texts[::2], texts[1::2], strict=True))


def _text(path: Path, what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{what} of {path} is not text")
    if value != value.encode(errors="replace").decode():
        raise RequestError(f"{what} of {path} holds half a character (a lone surrogate)")
    return value

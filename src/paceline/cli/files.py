"""Files and standard input that options name, read as text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from paceline.errors import RequestError

OPENING = "Once upon a time there was"
_STDIN_LIMIT = 64 << 20  # bytes; longer than any model's context


def names_model(word: str, before_prompt: bool = False) -> bool:
    """Return whether a word of the command line is a model rather than a prompt.

    Args:
        word: an argument.
        before_prompt: a prompt follows, so that hub ids and ensembles are models, too.
    """
    from paceline.models.known_models import KNOWN_MODELS

    if word in KNOWN_MODELS or word.endswith(".gguf"):
        return True
    if not word.strip():
        return False
    try:
        folder = Path(word).expanduser()
        if (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            return True
    except (OSError, RuntimeError, ValueError):  # a text that no file can be called
        return False
    if not before_prompt:
        return False
    return folder.exists() or bool(re.fullmatch(r"[^\s/]+(/[^\s/]+)+|\S+:weight=\S+", word))


def looks_like_path(word: str) -> bool:
    """Return whether a prompt looks like the path or the hub id of a model."""
    return bool(re.fullmatch(r"(~|\.{0,2})/\S+|[\w.-]+/[\w.-]+", word))


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, read from stdin where it is `-`.

    Raises:
        RequestError: it is empty, or stdin is not text.
    """
    text = OPENING if prompt is None else read_stdin() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty; give some text, or leave it out for a story")
    return text


def read_stdin() -> str:
    """Read all of stdin.

    Raises:
        RequestError: it is not text.
    """
    try:
        return sys.stdin.buffer.read(_STDIN_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text (byte {error.start})") from None


def read_prediction(path: Path) -> str:
    """Read the text that the output is expected to be.

    Raises:
        RequestError: it cannot be read, is not text, or is empty.
    """
    text = read_text("the prediction", path)
    if not text:
        raise RequestError(f"the prediction in {path} is empty; give some text, or leave it out")
    return text


def read_tools(path: Path | None, choice: str) -> list[Any]:
    """Read the tools that `--tools` names.

    Raises:
        RequestError: it cannot be read, holds no JSON list, or there is a choice without it.
    """
    if path is None:
        if choice not in ("auto", "none"):
            raise RequestError(
                f"--tool-choice is {choice!r}, but there are no --tools; name a file"
            )
        return []
    try:
        tools = json.loads(read_text("the tools", path))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error!s:.100}") from None
    if not isinstance(tools, list) or not tools:
        raise RequestError(f"{path} holds no JSON list of tools")
    return tools


def read_text(what: str, path: Path) -> str:
    """Read a UTF-8 text file; `what` says in errors what it holds.

    Raises:
        RequestError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read {what} in {path}: {error.strerror}") from None

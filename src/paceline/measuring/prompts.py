"""Prompt files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.errors import RequestError

# 24 questions of many kinds, for whoever names no prompts.
QUESTIONS = Path(__file__).with_name("questions.jsonl")
_SHOWN = 5  # bad lines named in a message


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One line of a prompt file: what a user says, turn by turn.

    Attributes:
        turns: at least one; most files have exactly one.
        category: for tables; `text` if the file names none.
        line: line number in the file, from 1.
    """

    turns: tuple[str, ...]
    category: str
    line: int

    def name(self, turn: int) -> str:
        """Return the name of a turn in reports."""
        return f"line {self.line}" + (f" turn {turn + 1}" if len(self.turns) > 1 else "")


def read_prompts(path: Path, limit: int | None = None) -> list[Dialogue]:
    """Read the first `limit` prompts of a file.

    A `.jsonl` file has one object per line, with `prompt` (a string) or `turns` (strings), and
    optionally `category`; any other file is text with one prompt per line. Empty lines are skipped.

    Raises:
        RequestError: no such file, no prompt in it, or bad lines, by number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a string may hold other line ends
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"cannot read the prompts in {path}: {error.strerror}") from None
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    dialogues: list[Dialogue] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(dialogues) == limit:
            break
        if line.strip():
            try:
                dialogues.append(parse(line, number))
            except ValueError as error:
                bad.append(f"line {number} {error}")
    if bad:
        more = f", and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise RequestError(f"{path}: {', '.join(bad[:_SHOWN])}{more}")
    if not dialogues:
        raise RequestError(f"{path} holds no prompt")
    return dialogues


def first_turns(path: Path) -> list[str]:
    """Return the first turn of each prompt of a file; see `read_prompts`."""
    return [dialogue.turns[0] for dialogue in read_prompts(path)]


def _from_text(line: str, number: int) -> Dialogue:
    return Dialogue((line,), "text", number)


def _from_json(line: str, number: int) -> Dialogue:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(row, dict) or not ("prompt" in row or "turns" in row):
        raise ValueError("has neither 'prompt' nor 'turns'")
    turns = row["turns"] if "turns" in row else [row["prompt"]]
    if not isinstance(turns, list) or not turns or not all(map(_is_text, turns)):
        raise ValueError("has a prompt that is not text or is empty")
    category = row.get("category", "text")
    if not isinstance(category, str):
        raise ValueError("has a category that is not text")
    return Dialogue(tuple(turns), category, number)


def _is_text(value: object) -> bool:
    """Return whether a tokenizer can read a value: a lone surrogate has no UTF-8 form."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)

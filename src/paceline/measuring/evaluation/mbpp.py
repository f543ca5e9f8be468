"""MBPP: does the function that the model writes pass the tests?"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.answers import Message, check_prompts, write_answers
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import (
    Row,
    find_file,
    is_any_text,
    is_number,
    is_text,
    is_texts,
    read_rows,
)
from paceline.sandbox import SandboxLimits, check_sandbox, run_program

_FIELDS = {
    "text": is_text,
    "code": is_text,
    "task_id": is_number,
    "test_list": is_texts,
    "test_setup_code": is_any_text,
}
_EXAMPLES = range(1, 11)  # task ids, as in the paper's section 2.1
_TEST = range(11, 511)
_TASK = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)
_LIMITS = SandboxLimits(seconds=5.0, megabytes=512)


class Mbpp(Suite):
    """Tasks for a Python function. Austin et al., arXiv 2108.07732.

    Programs run in the sandbox of `sandbox.py`, one at a time. A task is solved if its program
    reaches the line behind its last test.

    Args:
        folder: holds JSON lines with `text`, `code`, `task_id`, `test_list`, `test_setup_code`.
        allow_code: whether programs of the model may be run.
        limit: only the first tasks.
        shots: solved examples before each task, of those with the ids 1 to 10.
        chat: tasks are messages of the chat template, without examples.
        max_new_tokens: maximum tokens of an answer.

    Raises:
        RequestError: programs may not be run, or the data cannot be read.
        MethodError: programs cannot be confined on this machine.
    """

    name = "mbpp"
    metrics = (Metric("solved", Kind.SHARE, "correct"),)
    generates = True
    batch = 8

    def __init__(
        self,
        folder: Path,
        allow_code: bool = False,
        limit: int | None = None,
        shots: int = 3,
        chat: bool = False,
        max_new_tokens: int = 400,
    ) -> None:
        if not allow_code:
            raise RequestError(
                "mbpp runs programs that the model writes, in a sandbox; allow it with --allow-code"
            )
        check_sandbox()
        path = find_file(folder, "mbpp", "mbpp.jsonl", "mbpp*.jsonl")
        rows = list(read_rows(path, _FIELDS))
        tasks = islice((row for row in rows if row["task_id"] in _TEST), limit)
        self.items = [
            Item(row, item_key(row["text"], row["test_setup_code"], row["test_list"]))
            for row in tasks
        ]
        if not self.items:
            raise RequestError(f"{path} holds no task with an id of 11 to 510, which are the test")
        solved = [row for row in rows if row["task_id"] in _EXAMPLES]
        used = 0 if chat else shots
        if len(solved) < used:
            raise RequestError(f"{path} holds {len(solved)} examples, expected {used} for --shots")
        self._examples = "".join(map(_example, solved[:used]))
        self._settings = {"shots": used, "chat": chat, "max_new_tokens": max_new_tokens}

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return how tasks are asked.

        Raises:
            RequestError: the prompts are too long for the model, or it has no chat template.
        """
        limit: int = self._settings["max_new_tokens"]
        longest = sorted(self.items, key=lambda item: -len(str(item.content["test_list"])))[:4]
        check_prompts(lm, self.name, [self._prompt(item) for item in longest], limit)
        return {**self._settings, "examples": item_key(self._examples)}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each task whether the answer's program passes the tests, and the answer."""
        prompts = [self._prompt(item) for item in items]
        stops = () if self._settings["chat"] else ("[DONE]",)
        answers = write_answers(lm, prompts, self._settings["max_new_tokens"], stops)
        return [
            {"correct": int(passes(item.content, code_of(answer))), "answer": answer}
            for item, answer in zip(items, answers, strict=True)
        ]

    def _prompt(self, item: Item) -> str | list[Message]:
        task = _task(item.content)
        if self._settings["chat"]:
            return [{"role": "user", "content": f"{task}\nAnswer with one block of code."}]
        return f"{self._examples}{task}[BEGIN]\n"


def _task(row: Row) -> str:
    return _TASK.format(text=row["text"], tests="\n".join(row["test_list"]))


def _example(row: Row) -> str:
    code = row["code"].replace("\r\n", "\n").strip()
    return f"{_task(row)}[BEGIN]\n{code}\n[DONE]\n\n"


def code_of(answer: str) -> str:
    """Return the program of an answer: its first block of code, or all of it without one."""
    answer = answer.partition("[DONE]")[0]
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    language, line_end, body = rest.partition("\n")
    block = body if line_end and " " not in language.strip() else rest
    return block.partition("```")[0]


def passes(row: Row, code: str) -> bool:
    """Return whether a program passes the tests of a task, run in the sandbox."""
    mark = secrets.token_hex(16)  # what a program that ends before the tests cannot print
    parts = [code, row["test_setup_code"], *row["test_list"], f"print({mark!r})"]
    result = run_program("\n".join(parts) + "\n", "", _LIMITS)
    return result.ended == "exit" and result.output.endswith(f"{mark}\n")

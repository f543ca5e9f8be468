"""GSM8K: is the number at the end of the worked answer the right one?"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.answers import Message, check_prompts, write_answers
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite, item_key
from paceline.measuring.evaluation.data import find_file, is_text, read_rows

_FIELDS = {"question": is_text, "answer": is_text}
_NUMBER = re.compile(r"-?\$?-?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_TASK = "{}\n\nWork it out step by step. End with a line of #### and the number, e.g. #### 42"


class Gsm8k(Suite):
    """Grade-school problems. Cobbe et al., arXiv 2110.14168.

    An answer is right if the number after its first `####` is that of the data.

    Args:
        folder: holds `test.jsonl`, and `train.jsonl` for the examples, with `question` and
            `answer`.
        limit: only the first problems.
        shots: worked examples before each problem, drawn from the training set.
        seed: of that draw.
        chat: problems are messages of the chat template, without examples.
        max_new_tokens: maximum tokens of an answer.

    Raises:
        RequestError: the data cannot be read.
    """

    name = "gsm8k"
    metrics = (Metric("exact", Kind.SHARE, "correct"),)
    generates = True
    batch = 8

    def __init__(
        self,
        folder: Path,
        limit: int | None = None,
        shots: int = 5,
        seed: int = 0,
        chat: bool = False,
        max_new_tokens: int = 400,
    ) -> None:
        path = find_file(folder, "gsm8k", "test.jsonl", "gsm8k*test*.jsonl")
        rows = read_rows(path, _FIELDS)
        self.items = [
            Item((row["question"], row["answer"]), item_key(row["question"], row["answer"]))
            for row in islice(rows, limit)
        ]
        for number, item in enumerate(self.items, 1):
            if final_number(item.content[1]) is None:
                raise RequestError(f"{path}: problem {number} has no number after ####")
        if not self.items:
            raise RequestError(f"{path} holds no problem")
        self._settings = {
            "shots": 0 if chat else shots,
            "seed": seed,
            "chat": chat,
            "max_new_tokens": max_new_tokens,
        }
        self._examples = "" if chat or not shots else _examples(folder, shots, seed)

    def settings(self, lm: LM) -> dict[str, Any]:
        """Return how problems are asked.

        Raises:
            RequestError: the prompts are too long for the model, or it has no chat template.
        """
        limit: int = self._settings["max_new_tokens"]
        longest = sorted(self.items, key=lambda item: -len(item.content[0]))[:4]
        check_prompts(lm, self.name, [self._prompt(item) for item in longest], limit)
        return {**self._settings, "examples": item_key(self._examples)}

    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return for each problem whether it is solved, and the answer."""
        prompts = [self._prompt(item) for item in items]
        stops = () if self._settings["chat"] else ("\nQuestion:",)
        answers = write_answers(lm, prompts, self._settings["max_new_tokens"], stops)
        return [
            {
                "correct": int(final_number(answer) == final_number(item.content[1])),
                "answer": answer,
            }
            for item, answer in zip(items, answers, strict=True)
        ]

    def _prompt(self, item: Item) -> str | list[Message]:
        question = item.content[0]
        if self._settings["chat"]:
            return [{"role": "user", "content": _TASK.format(question)}]
        return f"{self._examples}Question: {question}\nAnswer:"


def _examples(folder: Path, shots: int, seed: int) -> str:
    path = find_file(folder, "gsm8k", "train.jsonl", "gsm8k*train*.jsonl")
    rows = list(read_rows(path, _FIELDS))
    if len(rows) < shots:
        raise RequestError(f"{path} holds {len(rows)} problems, expected {shots} for --shots")
    chosen = random.Random(seed).sample(rows, shots)
    return "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in chosen)


def final_number(answer: str) -> Decimal | None:
    """Return the number after the first `####` of an answer; None if there is none.

    Signs of currency and separators of thousands are left out: `$1,200.00` is 1200.
    """
    _, mark, rest = answer.partition("####")
    found = _NUMBER.search(rest.partition("\n")[0]) if mark else None
    if found is None:
        return None
    try:
        return Decimal(found[0].replace("$", "").replace(",", ""))
    except InvalidOperation:
        return None

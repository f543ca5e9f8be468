"""What `end_to_end.py` asks: prompts as token ids, and where answers end."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drafters import PROMPT, QUESTIONS, prompts
from paceline import LM
from paceline.measuring.prompts import read_prompts

TASKS = {  # category of Spec-Bench -> its task; the others are turns of MT-Bench
    name: name for name in ("translation", "summarization", "qa", "math_reasoning", "rag")
}


class Asked(NamedTuple):
    """Prompts and how answers end.

    Attributes:
        prompts: token ids.
        tasks: of each prompt; empty where there are none.
        new: most tokens of an answer.
        stops: tokens that end one; empty: answers have `new` tokens.
    """

    prompts: list[list[int]]
    tasks: list[str]
    new: int
    stops: frozenset[int]

    def ended(self, tokens: list[int]) -> list[int]:
        """Return an answer up to its end, the stop token not included, one token at least."""
        stop = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[: min(max(stop, 1), self.new)]


def questions(lm: LM, each: int, chat: bool, new: int) -> tuple[list[str], list[list[int]]]:
    """Return tasks and prompts: the first turns of the first questions of each task.

    Prompts that the model's context does not hold beside an answer lose their beginning; in a chat,
    they are left out.
    """
    room = lm.engine.config.context - new
    tasks: list[str] = []
    asked: list[list[int]] = []
    taken: dict[str, int] = {}
    for dialogue in read_prompts(QUESTIONS):
        task = TASKS.get(dialogue.category, "multi-turn")
        category = taken.setdefault(dialogue.category, 0)
        # MT-Bench's eight categories take turns.
        most = each if task != "multi-turn" else -(-each // 8)
        if category >= most or tasks.count(task) >= each:
            continue
        text = dialogue.turns[0]
        if chat:
            ids = list(lm.tokenizer.encode_chat([{"role": "user", "content": text}]))
            if len(ids) > room:
                continue
        else:
            ids = list(lm.tokenizer.encode(text))[-min(room, 256) :]
        taken[dialogue.category] += 1
        tasks.append(task)
        asked.append(ids)
    order = sorted(range(len(tasks)), key=lambda i: tasks.index(tasks[i]))
    return [tasks[i] for i in order], [asked[i] for i in order]


def asked(lm: LM, *, tasks: int | None, chat: bool, random: bool, count: int, new: int) -> Asked:
    """Return what the command line asks for."""
    stops = lm.model.defaults.stop_tokens if chat else frozenset[int]()
    if tasks:
        names, ids = questions(lm, tasks, chat, new)
        return Asked(ids, names, new, stops)
    if random:
        draws = np.random.default_rng(0).integers(3, len(lm.tokenizer), (count, PROMPT))
        return Asked(draws.tolist(), [], new, stops)
    return Asked(prompts(lm, slice(0, count)), [], new, stops)

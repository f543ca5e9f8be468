"""Drafts and guides read long texts in parts: nobody's stream waits for all of one."""

from collections import Counter

import pytest

from paceline import LM
from paceline.core import Cost
from paceline.serving.worker import Worker
from tests.serving.test_worker import PROMPTS

LONG = " ".join(PROMPTS) * 10
FLAT = Cost((1, 2, 64), (1.0, 1.0, 8.0))  # a pass may carry a few tokens


@pytest.fixture(scope="module")
def plain():
    return LM(drafter="plain", threads=1)


class Steps:
    """Runs a worker and counts, step by step, the tokens of texts that drafts and guides read."""

    def __init__(self, monkeypatch, lm, **options):
        self.engines, self.lm = [lm.engine, *lm.drafter.engines, *lm.beside.engines], lm
        self.worker = Worker(lm, **options)
        self.worker.governor._seconds[:] = 1.0
        self.read, self.longest, self.events = Counter(), Counter(), []

    def look(self, engine, batch, rows):
        if rows == "none":  # texts are read without logits, by drafts and guides only
            for _, tree in batch:
                self.read[engine] += len(tree)

    def step(self):
        self.read.clear()
        self.events += self.worker.step()
        self.longest |= self.read
        return sum(self.read.values())

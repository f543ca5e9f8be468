"""On real models no drafter changes a token, whatever the weights are stored in."""

from __future__ import annotations

import pytest

from paceline import LM
from paceline.cli.parsing import find_drafters
from paceline.decoding.governor import Fixed
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.prompts import QUESTIONS, read_prompts
from paceline.measuring.proof import prove
from tests.real_models import real_file

TEMPERATURES = (0.0, 0.8)


def check(lm: LM, lines: slice, tokens: int) -> None:
    """Every exact drafter writes what plain decoding writes, greedy and sampled."""
    methods, _ = find_drafters(["all"])
    dialogues = read_prompts(QUESTIONS)[lines]
    chat = lm.tokenizer.template is not None
    options = TurnOptions(tokens, chat=chat)
    found = prove(lm, methods, dialogues, TEMPERATURES, options, lambda: Fixed(8))
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    assert len(methods) >= 10
    assert found.total("pairs") == turns * len(methods) * len(TEMPERATURES)
    assert found.findings == []


def test_in_the_bits_of_the_file(lm):
    check(lm, slice(2), tokens=16)


@pytest.mark.real
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_in_other_formats(stored):
    with LM(real_file("smollm2-135m"), threads=2, dtype=stored) as lm:
        check(lm, slice(1, 2), tokens=10)

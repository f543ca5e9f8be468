"""On real models no drafter changes a token, whatever the weights are stored in."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paceline import LM
from paceline.cli.app import app
from paceline.cli.parsing import find_drafters
from paceline.decoding.governor import Fixed
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.prompts import QUESTIONS, read_prompts
from paceline.measuring.proof import prove
from tests.real_models import real_file

TEMPERATURES = (0.0, 0.8)

pytestmark = pytest.mark.timeout(1200)  # on a busy machine


def check(lm: LM, tokens: int = 8, without: tuple[str, ...] = ("layer_skip",)) -> None:
    """Every exact drafter writes what plain decoding writes, greedy and sampled.

    Two questions, so that the second meets what was learned from the first. `layer_skip`, whose
    drafts cost more than all others together, runs on SmolLM2 in the bits of its file only.
    """
    methods, _ = find_drafters(["all"])
    methods = {name: method for name, method in methods.items() if name not in without}
    dialogues = [read_prompts(QUESTIONS)[number] for number in (1, 12)]
    chat = lm.tokenizer.template is not None
    options = TurnOptions(tokens, chat=chat)
    found = prove(lm, methods, dialogues, TEMPERATURES, options, lambda: Fixed(8))
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    assert len(methods) >= 10
    assert found.total("pairs") == turns * len(methods) * len(TEMPERATURES)
    assert found.findings == []


def test_in_the_bits_of_the_file(lm, model):
    check(lm, tokens=12, without=() if model.chat else ("layer_skip",))


@pytest.mark.real
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_in_other_formats(stored):
    with LM(real_file("smollm2-135m"), threads=2, dtype=stored) as lm:
        check(lm)


@pytest.mark.real
@pytest.mark.parametrize("form", ["bf16", "q8_0", "q4_k"])
def test_converted(form, tmp_path):
    out = tmp_path / ("model" if form == "bf16" else "model.gguf")
    command = ["convert", str(real_file("smollm2-135m")), str(out), "--format", form]
    assert CliRunner().invoke(app, command).exit_code == 0
    with LM(out, threads=2) as lm:
        assert lm.engine.format != "fp32"
        check(lm)
        answer = lm.chat([{"role": "user", "content": "What is the capital of France?"}])
        assert "Paris" in answer.text

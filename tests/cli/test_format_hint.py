"""What is said of weights that are fp32 as stored."""

import re
import sys

import pytest

from paceline.cli import format_hint
from paceline.cli.format_hint import FormatNumbers, hint_formats, sentence
from paceline.lm import LM
from tests.conftest import shared

ROW = r"--format int8: \d+ tokens/s, [\d,]+ MB, perplexity [+-]\d+\.\d%"


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(format_hint, "_SMALLEST", 0)
    with LM(shared("models", "stories260K"), drafter="plain", budget=0) as model:
        yield model


@pytest.fixture
def terminal(monkeypatch):
    def be(value):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: value, raising=False)

    return be


def test_numbers_are_measured_once_and_said_with_what_they_cost(lm, tmp_path, terminal, capsys):
    terminal(False)
    hint_formats(lm, "auto", tmp_path)
    assert capsys.readouterr().err == ""
    terminal(True)
    hint_formats(lm, "auto", tmp_path)
    first = capsys.readouterr().err
    assert first.startswith("measuring once")
    assert re.search(rf"the weights are fp32 as stored: \d+ tokens/s, .*{ROW}", first)
    terminal(False)
    hint_formats(lm, "auto", tmp_path)
    again = capsys.readouterr().err
    assert again == first.partition("\n")[2]
    assert again.count("\n") == 1


def test_nothing_is_said_where_a_format_was_chosen_or_is_smaller(lm, tmp_path, terminal, capsys):
    terminal(True)
    hint_formats(lm, "fp32", tmp_path)
    with LM(shared("models", "stories260K"), dtype="int8", drafter="plain", budget=0) as small:
        hint_formats(small, "auto", tmp_path)
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupt_and_a_model_without_other_formats_are_no_errors(
    lm, tmp_path, terminal, capsys, monkeypatch
):
    def interrupted(lm):
        raise KeyboardInterrupt

    terminal(True)
    monkeypatch.setattr(format_hint, "_measure", interrupted)
    hint_formats(lm, "auto", tmp_path)
    assert "not measured" in capsys.readouterr().err
    only = [FormatNumbers("fp32", 1.0, 1, 1.0)]
    monkeypatch.setattr(format_hint, "_measure", lambda lm: only)
    hint_formats(lm, "auto", tmp_path)


def test_the_sentence_compares_with_the_stored_format():
    rows = [FormatNumbers("fp32", 12, 538_000_000, 3.0), FormatNumbers("int8", 25, 10**8, 3.01)]
    assert sentence(rows).startswith(
        "the weights are fp32 as stored: 12 tokens/s, 538 MB here; --format int8: 25 tokens/s, "
        "100 MB, perplexity +1.0% on a short text; they round"
    )

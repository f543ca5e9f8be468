import json

import numpy as np
import pytest

from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.planning import Planning
from paceline.decoding.text_stream import TextStream
from paceline.errors import MethodError, RequestError
from tests.decoding.strategies.test_beam import Counting
from tests.toy import Oracle

PIECES = ["print(", "1", "2", "+", ")", "\n"]
# What follows what, likeliest first: greedy writes print(1).
NEXT = {0: (1, 2), 1: (4, 3), 2: (4, 3), 3: (1, 2), 4: (5,), 5: (0,)}


class Pieces:
    def push(self, token):
        return PIECES[token]

    def flush(self):
        return ""


class Programmer(Counting):
    """Writes small sums; after one number it would rather end than go on."""

    def __init__(self, **options):
        super().__init__(vocab_size=6, **options)

    def logits_after(self, tokens):
        logits = np.full(6, -np.inf, np.float32)
        for rank, token in enumerate(NEXT[tokens[-1]]):
            logits[token] = 3.0 - 2 * rank
        return logits


def task(engine, limit=9, **options):
    request = Request((5,), limit, stop_tokens=frozenset({5}))
    return Task(engine, request, lambda: TextStream(Pieces()), **options)


def write_tests(tmp_path, *pairs):
    path = tmp_path / "tests.jsonl"
    lines = [json.dumps({"input": a, "output": b}) for a, b in pairs]
    path.write_text("\n\n".join(lines))
    return str(path)


def test_it_finds_a_program_where_greedy_fails(tmp_path):
    engine = Programmer()
    tests = write_tests(tmp_path, ("unread", "4 \n"))
    settings = Planning(tests, run_programs=True, rollouts=40)
    (found,) = settings.run(task(engine, 6))
    assert (found.text, found.score, found.finish) == ("print(2+2)", 1.0, "stop")
    assert engine.opened == 0
    assert engine.most <= 2
    greedy = Planning(tests, run_programs=True, rollouts=1, k=1).run(task(engine, 6))[0]
    assert (greedy.text, greedy.score) == ("print(1)", 0.0)


def test_what_stands_before_the_program_counts_and_partial_rewards_rank(tmp_path):
    head = tmp_path / "head.py"
    head.write_text("n = int(input())\n_print = print\nprint = lambda x: _print(x * n)\n")
    tests = write_tests(tmp_path, ("2", "6"), ("3", "nothing"))
    settings = Planning(tests, str(head), run_programs=True, rollouts=9, returned=3)
    found = settings.run(task(Programmer(), limit=6))
    assert found[0].text in ("print(1+2)", "print(2+1)")
    assert found[0].score == 0.5
    scores = [output.score for output in found]
    assert scores == sorted(scores, reverse=True)


def test_a_reward_of_ones_own_runs_nothing(monkeypatch):
    monkeypatch.setattr("paceline.decoding.strategies.planning.run_program", None)
    (found,) = Planning(reward=lambda text: text.count("+") / 3, rollouts=50).run(
        task(Programmer(), limit=12)
    )
    assert found.text.count("+") == 3


def test_a_small_tree_is_searched_whole_and_then_it_ends():
    seen = []
    (found,) = Planning(reward=lambda text: seen.append(text) or 0.0, k=2, rollouts=999).run(
        task(Programmer(), limit=4)
    )
    # print(, a number, then ) and its end or + and a number.
    assert len(seen) == len(set(seen))
    whole = {f"print({a})" for a in "12"} | {f"print({a}+{b}" for a in "12" for b in "12"}
    assert set(seen) == whole
    assert found.score == 0


def test_completions_are_drafted_and_the_output_is_the_same(tmp_path):
    def reward(text):
        return (text == "print(1+1)") * 1.0

    drafted, plain = Programmer(), Programmer()
    with_drafts = task(drafted, 12, drafter=Oracle(drafted), budget=Fixed(8))
    found = Planning(reward=reward, rollouts=99).run(with_drafts)[0]
    same = Planning(reward=reward, rollouts=99).run(task(plain, 12))[0]
    assert found.tokens == same.tokens
    assert found.score == 1
    assert found.passes < same.passes


@pytest.mark.parametrize("at", [1, 2, 3, 8, 14])
def test_an_interrupted_search_gives_what_there_is(at):
    engine = Programmer(interrupt=at)
    found = Planning(reward=lambda text: 0.0, rollouts=99).run(task(engine))
    assert engine.opened == 0
    assert len(found) == 1
    assert at < 8 or found[0].text


def test_what_cannot_be_run_is_refused(tmp_path):
    tests = write_tests(tmp_path, ("", "4"))
    with pytest.raises(MethodError, match="run_programs=true"):
        Planning(tests).run(task(Programmer()))
    with pytest.raises(MethodError, match="needs tests"):
        Planning(run_programs=True).run(task(Programmer()))
    for content, message in (
        ("", "no tests"),
        ('{"input": 1, "output": ""}', "line 1"),
        ('{"input": "", "output": ""}\n[]', "line 2"),
        ("[" * 100_000, "line 1"),
    ):
        (tmp_path / "tests.jsonl").write_text(content)
        with pytest.raises(RequestError, match=message):
            Planning(tests, run_programs=True).run(task(Programmer()))
    with pytest.raises(RequestError, match="cannot read"):
        Planning(str(tmp_path / "none"), run_programs=True).run(task(Programmer()))
    for settings in ({"k": 0}, {"rollouts": 0}, {"seconds": 0}, {"megabytes": 1}):
        with pytest.raises(MethodError, match="planning"):
            Planning(**settings)

import json

import pytest

from paceline.cli import parsing
from paceline.core import Exactness
from tests.conftest import shared
from tests.measuring.toy_lm import Broken, Knowing

SMALL = ("--max-new-tokens", "12", "--drafters", "oracle")


@pytest.fixture(autouse=True)
def _oracle(monkeypatch, toy):
    monkeypatch.setattr(
        parsing, "find_drafters", lambda texts: ({"oracle": Knowing(toy.engine)}, ["needy"])
    )


def test_no_bug_exits_with_0_and_says_what_was_compared(paceline, toy, prompts):
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL, "--temperatures", "0,1.0")
    assert done.code == 0
    assert "oracle" in done.out
    lines = done.err.splitlines()
    assert "left out needy: it needs something; name it with its settings" in lines
    assert lines[-1].startswith("6 pairs: 6 identical, 0 ties, 0 bugs; drafters carried over")


def test_json_has_counts_conditions_and_settings(paceline, toy, prompts, tmp_path):
    out = tmp_path / "proof.json"
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL, "--json", "--out", out)
    found = done.json
    assert json.loads(out.read_text()) == found
    assert {k: found[k] for k in ("pairs", "identical", "ties", "bugs", "first", "clipped")} == {
        "pairs": 9,
        "identical": 9,
        "ties": 0,
        "bugs": 0,
        "first": None,
        "clipped": 0,
    }
    assert (found["state"], found["left_out"]) == ("carried", ["needy"])
    assert found["settings"]["temperatures"] == [0.0, 0.7, 1.0]
    assert found["engine"]["invariant"] is True
    assert found["drafters"]["oracle"]["pairs"] == 9
    assert found["versions"]["paceline"]


def test_what_drafters_learnt_goes_through_a_file(paceline, prompts):
    words = ("prove", shared("models", "stories260K"), "--prompts", prompts, "--limit", 2)
    more = (
        "--drafters",
        "recycle,lookahead_trie,blend",
        "--max-new-tokens",
        12,
        "--reload",
        "--json",
    )
    done = paceline(*words, *more)
    assert done.code == 0
    assert done.json["state"] == "reloaded"
    assert all(d["identical"] == d["pairs"] for d in done.json["drafters"].values())


def test_a_bug_exits_with_1_and_is_shown(paceline, toy, prompts):
    toy.engine = Broken(length=14, nudge=9.0)
    words = ("prove", "toy", "--prompts", prompts, *SMALL, "--temperatures", "0")
    done = paceline(*words)
    assert done.code == 1
    assert "oracle at temperature 0, line 1, new token 5: plain has token" in done.err
    found = paceline(*words, "--json")
    assert (found.code, found.json["first"]["verdict"]) == (1, "bug")
    assert found.json["first"]["position"] == 5


def test_ties_alone_exit_with_0(paceline, toy, prompts):
    toy.engine = Broken(length=14, nudge=9.0)
    toy.engine.invariant, toy.engine.tolerance = False, 100.0
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL, "--json")
    assert done.code == 0
    assert done.json["ties"] > 0


def test_clipped_prompts_are_counted(paceline, toy, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x" * 100)
    done = paceline("prove", "toy", "--prompts", path, *SMALL)
    assert "3 of 3 prompts were clipped to fit the context" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperatures", "hot"), "expected a number"),
        (("--temperatures", "-1"), "expected numbers of 0 or more"),
        (("--limit", "0"), "--limit"),
        (("--max-new-tokens", "64"), "expected 1 to 63"),
        (("--out", "no/such/folder/x.json"), "there is no folder"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (("--seed", "1.5"), "--seed"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(paceline, toy, prompts, words, said):
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL, *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_without_prompts_the_questions_of_the_package_are_taken(paceline, toy):
    done = paceline("prove", "toy", *SMALL, "--temperatures", "0,0.8", "--limit", 20, "--json")
    assert done.code == 0
    found = done.json["settings"]
    assert (found["file"], found["lines"]) == ("built-in questions", 20)
    assert done.json["pairs"] == 2 * found["turns"] > 40


def test_a_suite_needs_its_file(paceline, toy):
    done = paceline("bench", "toy", *SMALL, "--suite", "spec-bench")
    assert done.code == 2
    assert "name it with --prompts" in done.err


def test_the_rejection_walk_has_no_tokens_to_compare(paceline, toy, prompts):
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL, "--walk", "rejection")
    assert (done.code, done.out) == (2, "")
    assert "the walk keeps the distribution of the output" in done.err


def test_lossy_drafters_cannot_be_proven(paceline, toy, prompts, monkeypatch):
    class Lossy:
        exactness = Exactness.LOSSY

    monkeypatch.setattr(parsing, "find_drafters", lambda texts: ({"bild": Lossy()}, []))
    done = paceline("prove", "toy", "--prompts", prompts, *SMALL)
    assert (done.code, done.out) == (2, "")
    assert "the lossy drafter bild" in done.err

import json

import pytest

from paceline.lm import LM
from tests.conftest import shared


def words(*more):
    model = shared("models", "stories260K")
    return ("generate", "Once upon a time", "--model", model, "--max-new-tokens", 12, *more)


@pytest.mark.parametrize(
    "strategy", ["beam:returned=2", "diverse", "best_of:n=3,returned=2", "lattice", "contrastive"]
)
def test_every_strategy_runs_and_python_gives_the_same(paceline, strategy):
    temperature = 0.8 if strategy.startswith("best_of") else 0.0
    hot = ("--temperature", temperature)
    done = paceline(*words("--strategy", strategy, "--json", *hot))
    assert done.code == 0
    lm = LM(shared("models", "stories260K"), drafter="plain")
    asked = {"max_new_tokens": 12, "temperature": temperature}
    found = lm.search("Once upon a time", strategy, **asked)
    assert [output["tokens"] for output in done.json["outputs"]] == [o.tokens for o in found]
    assert [output["text"] for output in done.json["outputs"]] == [o.text for o in found]
    assert 0 < done.json["passes"] <= found[0].passes
    assert "passes over" in done.err
    best = lm.generate("Once upon a time", strategy=strategy, **asked)
    assert best.tokens == found[0].tokens
    shown = paceline(*words("--strategy", strategy, *hot))
    assert shown.out == "\n\n".join(output.text for output in found) + "\n"


def test_planning_runs_programs_only_if_told(paceline, tmp_path):
    tests = tmp_path / "tests.jsonl"
    tests.write_text('{"input": "", "output": "nothing that a story prints"}\n')
    done = paceline(*words("--strategy", f"planning:tests={tests},rollouts=2"))
    assert done.code == 2
    assert "run_programs=true" in done.err
    text = f"planning:tests={tests},rollouts=2,run_programs=true"
    done = paceline(*words("--strategy", text, "--json", "--drafter", "recycle"))
    assert (done.code, done.json["outputs"][0]["score"]) == (0, 0.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("drafter", "plain"), ("budget", "0"), ("walk", "gumbel"), ("check", None)],
)
def test_options_that_a_search_has_no_use_for_are_refused(paceline, option, value):
    more = (f"--{option}",) if value is None else (f"--{option}", value)
    done = paceline(*words("--strategy", "beam", *more))
    assert (done.code, done.out) == (2, "")
    assert f"--{option} and --strategy beam do not go together" in done.err


def test_what_is_wrong_is_said_in_a_sentence(paceline):
    for strategy, message in (
        ("bean", "did you mean beam"),
        ("beam:width=0", "1 to 1024"),
        ("beam:breadth=3", "width"),
    ):
        done = paceline(*words("--strategy", strategy))
        assert done.code == 2
        assert message in done.err
    done = paceline(*words("--strategy", "beam", "--temperature", "1"))
    assert "draws nothing" in done.err
    assert done.code == 2


def test_grammars_hold_in_a_search(paceline):
    done = paceline(*words("--strategy", "beam:returned=2", "--choice", "a dog|two cats", "--json"))
    texts = [output["text"] for output in done.json["outputs"]]
    assert sorted(texts) == ["a dog", "two cats"]


def test_guides_steer_a_search_and_are_charged(paceline):
    guide = ("--guide", "cfg:negative=A dog,scale=4")
    done = paceline(*words("--strategy", "beam:returned=2", "--json", *guide))
    assert done.code == 0
    assert done.json["seconds"]["guide"] > 0
    assert "% guiding" in done.err
    plain = paceline(*words("--strategy", "beam:returned=2", "--json"))
    assert done.json["outputs"] != plain.json["outputs"]
    assert "guiding" not in plain.err
    done = paceline(*words("--strategy", "lattice", "--guide", "cfg:stop=0.1"))
    assert (done.code, done.out) == (2, "")
    assert "leave stop out" in done.err


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    lines = [{"prompt": "Once upon", "answer": "a"}, {"prompt": "One day", "answer": "e"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_tuning_goes_on_from_its_file(paceline, examples, tmp_path):
    def tune(out, budget, *more):
        return paceline(
            "tune-sampling", examples, "--model", shared("models", "stories260K"),
            "--scorer", "regex", "--token-budget", budget, "--tokens", "2..8", "--n", "1..3",
            "--out", out, *more,
        )  # fmt: skip

    first, whole = tmp_path / "first", tmp_path / "whole"
    assert tune(first, 60).code == 0
    done = tune(first, 300, "--json")
    tune(whole, 300)
    assert done.json == json.loads(first.read_text()) == json.loads(whole.read_text())
    assert done.json["best"]["verdict"] == "whole"
    assert "best: " in done.err
    other = tune(first, 300, "--seed", 3)
    assert other.code == 2
    assert "seed was 0, and is 3" in other.err
    first.write_text("{}")
    assert "not written by tune-sampling" in tune(first, 300).err


def test_bad_tuning_options_are_refused(paceline, examples):
    for option, value, message in (
        ("--n", "1..2.5", "whole numbers"),
        ("--n", "3..2", "expected increasing limits"),
        ("--tokens", "many", "expected a number"),
        ("--scorer", "vibes", "expected exact"),
        ("--command", "true", "belong together"),
    ):
        done = paceline("tune-sampling", examples, option, value)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    assert paceline("tune-sampling", examples.with_name("none")).code == 2

import json

import pytest

from paceline.lm import LM
from paceline.measuring.evaluation.blimp import Blimp
from paceline.measuring.evaluation.cache import ItemCache, model_identity
from paceline.measuring.evaluation.run import evaluate
from tests.conftest import shared


@pytest.fixture
def lm():
    return LM(shared("models", "stories260K"), drafter="plain", budget=1)


@pytest.fixture
def suite(tmp_path):
    rows = [
        {"sentence_good": f"Tom has {i} cats.", "sentence_bad": f"Tom have {i} cats.", "UID": "x"}
        for i in range(100)
    ]
    (tmp_path / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Blimp(tmp_path)


def counted(suite):
    """How many items are scored from now on."""
    scored = []
    score = suite.score

    def counting(lm, items):
        scored.extend(items)
        return score(lm, items)

    suite.score = counting
    return scored


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, lm, suite):
    whole = evaluate(suite, lm).results
    score, calls = suite.score, 0

    def interrupted(lm, items):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(lm, items)

    suite.score = interrupted
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite, lm, tmp_path / "kept")
    suite.score = score
    scored, ticks = counted(suite), []
    found = evaluate(suite, lm, tmp_path / "kept", lambda *step: ticks.append(step))
    assert found.results == whole
    assert found.earlier == 64
    assert len(scored) == 36
    assert ticks[0] == (64, True)
    assert sum(step[0] for step in ticks) == 100
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".json"]


def test_results_are_of_one_model_and_one_setting(tmp_path, lm, suite):
    evaluate(suite, lm, tmp_path / "kept")
    scored = counted(suite)
    assert evaluate(suite, lm, tmp_path / "kept").earlier == 100
    assert not scored
    rounded = LM(shared("models", "stories260K"), drafter="plain", budget=1, dtype="int8")
    assert evaluate(suite, rounded, tmp_path / "kept").earlier == 0
    assert evaluate(suite, lm, tmp_path / "kept", fresh=True).earlier == 0
    policy = "sliding_window:budget=32"
    bounded = LM(shared("models", "stories260K"), drafter="plain", budget=1, kv_policy=policy)
    assert evaluate(suite, bounded, tmp_path / "kept").earlier == 0
    suite._prefix = "none"
    assert evaluate(suite, lm, tmp_path / "kept").earlier == 0
    assert len(scored) == 400


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-20],
        lambda content: b"[1, 2]",
        lambda content: b"[" * 100_000,
        lambda content: b"\xff" + content,
        lambda content: content.replace(b'"correct"', b'"wrong"'),
        lambda content: content.replace(b'"nats": ', b'"nats": 1e999, "x": '),
        lambda content: content.replace(b'"correct": 1', b'"correct": true'),
    ],
)
def test_damaged_results_are_scored_again(tmp_path, lm, suite, damage):
    whole = evaluate(suite, lm, tmp_path / "kept").results
    [path] = (tmp_path / "kept").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    found = evaluate(suite, lm, tmp_path / "kept")
    assert found.results == whole
    assert found.earlier < 100
    assert evaluate(suite, lm, tmp_path / "kept").earlier == 100


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, lm, suite):
    (tmp_path / "file").touch()
    assert len(evaluate(suite, lm, tmp_path / "file" / "kept").results) == 100


def test_the_file_is_written_while_items_come_in(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("paceline.measuring.evaluation.cache.monotonic", lambda: clock[0])
    cache = ItemCache(tmp_path, "x", bool)
    cache.put("a", {"n": 1})
    assert not list(tmp_path.iterdir())
    clock[0] = 6.0
    cache.put("b", {"n": 2})
    again = ItemCache(tmp_path, "x", bool)
    assert again.get("a") == {"n": 1}
    assert again.get("b") == {"n": 2}
    assert ItemCache(tmp_path, "y", bool).get("a") is None


def test_ensembles_are_not_kept(tmp_path, suite):
    path = shared("models", "stories260K")
    both = LM(f"{path}:weight=0.5+{path}:weight=0.5", drafter="plain", budget=1, dtype="int8")
    assert model_identity(both) is None
    suite.items = suite.items[:3]
    assert len(evaluate(suite, both, tmp_path / "kept").results) == 3
    assert not (tmp_path / "kept").exists()

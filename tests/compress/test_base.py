"""The base of quality numbers: shuffled and rescaled, and the same function."""

import json

import numpy as np
import pytest
from benchmarks.compression import feedback, frontier
from benchmarks.compression.base import write_base

from paceline.engines.reference import ReferenceEngine
from paceline.models import load
from tests.conftest import shared


def logits(model):
    rows = []
    engine = ReferenceEngine(model.config, model.weights.to_arrays())
    ids = np.arange(3, 60, dtype=np.int32)
    engine.start(ids, lambda _, __, found: rows.append(found.copy()))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_a_base_computes_the_same_with_other_weights(tmp_path, name):
    model = load(shared("models", name))
    write_base(model, tmp_path / "base", seed=1)
    base = load(tmp_path / "base")
    one, other = logits(model), logits(base)
    assert np.abs(one - other).max() < 5e-4
    for each in ("layers.0.q", "layers.1.down", "layers.1.v", "layers.0.gate"):
        before, after = model.weights.dense(each), base.weights.dense(each)
        assert not np.array_equal(np.sort(before, axis=None), np.sort(after, axis=None))
    write_base(model, tmp_path / "again", seed=1)
    two = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert two == (tmp_path / "base" / "model.safetensors").read_bytes()
    write_base(model, tmp_path / "third", seed=2)
    assert two != (tmp_path / "third" / "model.safetensors").read_bytes()


def test_the_frontier_judges_recipes_and_remembers(tmp_path, monkeypatch, capsys):
    write_base(load(shared("models", "stories260K")), tmp_path / "base")
    words = ["frontier", tmp_path / "base", "--recipe", "rtn:group=32", "--windows", "2"]
    words += ["--rows", "1", "--length", "16", "--cache", tmp_path / "known.json"]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    frontier.main()
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert 4.5 <= float(row[2]) < 4.6
    assert len(json.loads((tmp_path / "known.json").read_text())) == 1
    monkeypatch.setattr(frontier, "judge", None)  # not asked again
    frontier.main()
    words = ["frontier", tmp_path / "base", "--folder", tmp_path / "base", "--windows", "2"]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    capsys.readouterr()
    frontier.main()
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [float(each) for each in row[2:3] + row[4:7]] == [32, 0, 0, 1]


def test_the_script_of_feedback_prints_a_share_for_each_type(monkeypatch, capsys):
    words = ["feedback", "--rows", "4", "--inputs", "256", "--type", "q4_0", "q4_k"]
    monkeypatch.setattr("sys.argv", words)
    feedback.main()
    shares = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert len(shares) == 2
    assert all(0.1 < float(each) < 1 for each in shares)

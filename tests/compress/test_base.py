"""The base of quality numbers: shuffled and rescaled, and the same function."""

import json

import numpy as np
import pytest
from benchmarks.compression import feedback, frontier, kills, plot
from benchmarks.compression.base import write_base

from paceline.engines.reference import ReferenceEngine
from paceline.models import load
from tests.conftest import shared
from tests.measuring.test_html import Reader


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
    with monkeypatch.context() as patch:
        patch.setattr(frontier, "judge", None)  # not asked again
        frontier.main()
    monkeypatch.setattr("sys.argv", [*map(str, words), "--speed"])
    frontier.main()
    [found] = json.loads((tmp_path / "known.json").read_text()).values()
    assert found["tokens_per_second"] > 0
    assert capsys.readouterr().out.splitlines()[-1].split("|")[7].strip() != ""
    monkeypatch.setattr(frontier, "judge", None)
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


def cached(name, recipe, size, nats, speed=None):
    row = {"bits": size / 1e6, "bytes": size, "nats": nats, "error": 0.001, "firsts": 0.9}
    row |= {} if speed is None else {"tokens_per_second": speed}
    return json.dumps([f"/bases/{name}", recipe, 20, "mixed", 64, 512, 0]), row


def test_the_plot_shows_every_result_and_joins_the_unbeaten(tmp_path, monkeypatch, capsys):
    rows = [
        *(
            cached("one-0", "rtn:bits=4", 4e6, 0.2, 90),
            cached("one-1", "rtn:bits=4", 4e6, 0.1, 110),
        ),
        *(cached("one-0", "awq+gptq:bits=4", 5e6, 0.05, 80), cached("one-0", "worse", 6e6, 0.3)),
        *(
            cached("one-0", "llama.cpp <Q8_0>", 8e6, -0.001),
            cached("two-0", "rtn:bits=4", 1e6, 1.0),
        ),
    ]
    cache, out = tmp_path / "known.json", tmp_path / "page.html"
    cache.write_text(json.dumps(dict(rows)))
    results = plot.read(cache)
    [mean] = [each for each in results if each.model == "one" and each.recipe == "rtn:bits=4"]
    assert (mean.seeds, mean.nats, mean.speed) == (2, pytest.approx(0.15), 100)
    of_one = [each for each in results if each.model == "one"]
    line = plot.unbeaten(of_one, lambda each: each.bytes)
    assert [each.method for each in line] == ["rtn", "awq+gptq", "llama.cpp"]
    monkeypatch.setattr("sys.argv", ["plot", str(cache), "--out", str(out)])
    plot.main()
    text = out.read_text(encoding="utf-8")
    page = Reader(text)
    tags = [tag for tag, _ in page.tags]
    # Two models; of one of them two results are timed.
    assert (tags.count("svg"), tags.count("circle"), tags.count("tr")) == (3, 4 + 2 + 1, 5 + 2)
    assert "llama.cpp &lt;Q8_0&gt;" in text
    assert {each.nats for each in results} <= set(page.data)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"a": 1}', '{"[\\"b\\"]": {}}'])
def test_the_plot_refuses_what_is_no_cache(tmp_path, monkeypatch, content):
    cache = tmp_path / "known.json"
    if content is not None:
        cache.write_text(content)
    with pytest.raises(SystemExit, match=r"known\.json (is no cache of frontier\.py|holds no)"):
        plot.read(cache)


def test_a_compression_that_is_killed_goes_on_in_processes_of_its_own(monkeypatch, capsys):
    model = shared("models", "stories260K")
    words = ["kills", model, "--recipe", "rtn:bits=3,group=32+eora:rank=2", "--kills", "1"]
    words += ["--rows", "2", "--length", "16", "--threads", "1", "--calibration", __file__]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    kills.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + 1 + 2
    assert said[-1].startswith("1 kills; ")


def test_a_folder_that_differs_after_a_kill_is_told(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"1")
    (tmp_path / "out" / "card.md").write_bytes(b"times")
    kills.check(tmp_path / "out", {"a": b"1"})
    with pytest.raises(SystemExit, match="differs from a whole run in a, b"):
        kills.check(tmp_path / "out", {"a": b"2", "b": b""})
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(SystemExit, match="was left behind"):
        kills.check(tmp_path / "out", {"a": b"1"})

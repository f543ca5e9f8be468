import json

from paceline.engines import cost_cache
from paceline.engines.cost_cache import known_cost
from tests.toy import ToyEngine


def test_a_curve_is_measured_once(tmp_path):
    first = known_cost(ToyEngine(), tmp_path)
    assert known_cost(ToyEngine(), tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


def test_another_shape_has_another_curve(tmp_path):
    known_cost(ToyEngine(), tmp_path)
    known_cost(ToyEngine(vocab_size=20), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_or_unwritable_file_is_measured_again(tmp_path):
    known_cost(ToyEngine(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"nodes": [4, 1], "seconds": [1]}')
    assert known_cost(ToyEngine(), tmp_path).nodes[0] == 1
    (tmp_path / "plain file").write_text("")
    assert known_cost(ToyEngine(), tmp_path / "plain file").nodes[0] == 1


def test_a_curve_of_a_busy_machine_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_cache, "_USEFUL", float("inf"))  # all sizes, however slow they are
    first = known_cost(ToyEngine(), tmp_path)
    (file,) = tmp_path.iterdir()
    for slow, kept in (
        (range(len(first.nodes)), False),
        ([first.nodes.index(8)], False),
        ((), True),
    ):
        seconds = [0.0 if not slow else s for s in first.seconds]  # less than they take now: kept
        for place in slow:
            seconds[place] = 5.0 + place
        stale = {"nodes": first.nodes, "seconds": seconds}
        file.write_text(json.dumps(stale))
        cost = known_cost(ToyEngine(), tmp_path)
        assert (list(cost.seconds) == seconds) == kept
        assert cost.at(8) < 5.0
        assert (json.loads(file.read_text())["seconds"] == seconds) == kept

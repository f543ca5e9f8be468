import json

import pytest

from paceline.measuring import bench as module
from paceline.measuring.bandwidth import Bandwidth
from tests.cli.test_bench import schema
from tests.conftest import shared


@pytest.fixture
def bench(paceline, prompts, monkeypatch):
    """Measures a model that is its own draft."""
    monkeypatch.setattr(module, "measure_bandwidth", lambda threads: Bandwidth(1e9, 1 << 28, 2))
    model = shared("models", "stories260K")
    words = ("bench", model, "--prompts", prompts, "--repeat", 1, "--max-new-tokens", 12)
    drafters = ("--drafters", f"model:path={model}")
    return lambda *more: paceline(*words, "--budget", 4, *drafters, *more)


def test_the_rejection_walk_is_equal_in_distribution_not_in_text(bench, tmp_path):
    out, html = tmp_path / "found.json", tmp_path / "page.html"
    done = bench("--walk", "rejection", "--temperature", 1.5, "--out", out, "--html", html)
    assert done.code == 0
    found = json.loads(out.read_text())
    pytest.importorskip("jsonschema").validate(found, schema())
    plain, drafted = found["arms"]
    assert found["settings"]["walk"] == drafted["walk"] == "rejection"
    assert (plain["walk"], plain["different"]) == ("gumbel", 0)
    assert {answer["equal"] for answer in plain["answers"]} == {"text"}
    assert drafted["different"] > 0
    assert drafted["tokens"] == plain["tokens"] == 36
    for answer in drafted["answers"]:
        assert answer["equal"] == ("text" if answer["identical"] else "distribution")
    assert "the rejection walk, equal in distribution, not in text" in done.out
    assert " distr. " in done.out
    assert "differ from" not in done.err
    page = html.read_text()
    assert "3 outputs come from the rejection walk: equal in distribution, not in text." in page
    assert "identical to plain decoding, token by token" not in page


def test_drafters_with_the_gumbel_walk_are_still_compared(bench):
    done = bench("--temperature", 1.5, "--json")
    assert done.code == 0
    _, drafted = done.json["arms"]
    assert (drafted["walk"], drafted["different"]) == ("gumbel", 0)
    assert {answer["equal"] for answer in drafted["answers"]} == {"text"}


def test_greedy_decoding_has_one_walk(bench):
    found = bench("--walk", "rejection", "--json").json
    assert found["settings"]["walk"] == "rejection"
    assert [arm["walk"] for arm in found["arms"]] == ["gumbel", "gumbel"]
    assert [arm["different"] for arm in found["arms"]] == [0, 0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--drafters", "lookup"), "the rejection walk and the drafter lookup do not go together"),
        (("--budget", "4,auto"), "the budget auto do not go together"),
        (("--choice", "yes|no"), "leave the grammar out"),
        (("--walk", "moon"), "the walk is 'moon', expected gumbel or rejection"),
        (("--walk", "moon", "--drafters", "plain"), "the walk is 'moon'"),
    ],
)
def test_what_the_rejection_walk_cannot_do_is_refused_before_the_work(bench, more, said):
    done = bench("--walk", "rejection", "--temperature", 1, *more)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1

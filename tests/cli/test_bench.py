import json
import re
from pathlib import Path

import pytest

from paceline.cli import parsing
from paceline.measuring import bench as module
from paceline.measuring.bandwidth import Bandwidth
from paceline.measuring.report.html import page
from tests.measuring.toy_lm import Broken, Knowing

SMALL = ("--max-new-tokens", "12", "--repeat", "1")


@pytest.fixture(autouse=True)
def _oracle(monkeypatch, toy):
    monkeypatch.setattr(
        parsing, "find_drafters", lambda texts: ({"oracle": Knowing(toy.engine)}, [])
    )
    monkeypatch.setattr(module, "measure_bandwidth", lambda threads: Bandwidth(1e9, 1 << 28, 2))


def schema():
    page = Path(__file__).parents[2] / "docs" / "reference" / "bench-json.md"
    return json.loads(re.search(r"```json\n(.*?)```", page.read_text(), re.S)[1])


def test_json_follows_the_documented_schema(paceline, toy, prompts, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    out = tmp_path / "bench.json"
    words = ("--budget", "4,auto", "--state", "reset", "--json", "--out", out)
    done = paceline("bench", "toy", "--prompts", prompts, *SMALL, *words)
    assert done.code == 0
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(done.json, schema())
    assert json.loads(out.read_text()) == done.json
    assert done.json["settings"]["budgets"] == [4, "auto"]
    assert done.json["settings"]["state"] == "reset"
    assert [arm["name"] for arm in done.json["arms"]] == ["plain", "oracle@4", "oracle@auto"]
    assert "Speed against plain" in done.err


def test_both_states_a_suite_and_a_page(paceline, toy, tmp_path):
    path, out, html = (tmp_path / name for name in ("question.jsonl", "a.json", "a.html"))
    kinds = ("writing", "coding", "qa", "qa", "rag")
    lines = [
        {"turns": ["Once", "More"][: 1 + (kind == "coding")], "category": kind} for kind in kinds
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    words = ("--suite", "spec-bench", "--tasks", "mt_bench,qa", "--limit", 2, "--state", "both")
    words += ("--budget", 16)
    done = paceline("bench", "toy", "--prompts", path, *SMALL, *words, "--out", out, "--html", html)
    assert done.code == 0
    found = json.loads(out.read_text())
    pytest.importorskip("jsonschema").validate(found, schema())
    assert found["settings"]["tasks"] == ["mt_bench", "qa"]
    assert [prompt["category"] for prompt in found["prompts"]] == ["mt_bench"] * 3 + ["qa"] * 2
    names = ["plain", "oracle@16 carried", "oracle@16 reset"]
    assert [arm["name"] for arm in found["arms"]] == names
    assert [arm["state"] for arm in found["arms"]] == ["carried", "carried", "reset"]
    for arm in found["arms"]:
        assert len(arm["answers"]) == len(found["prompts"])
        assert all(answer["identical"] for answer in arm["answers"])
        assert sum(answer["tokens"] for answer in arm["answers"]) == arm["tokens"] == 60
        seconds = arm["seconds"]
        assert seconds["draft"] + seconds["forward"] + seconds["walk"] < seconds["decode"]
    assert html.read_text() == page(found)
    assert sorted(tmp_path.iterdir()) == [html, out, path]


def test_tables_go_to_stdout(paceline, toy, prompts):
    done = paceline("bench", "toy", "--prompts", prompts, *SMALL, "--limit", 1)
    assert done.code == 0
    assert "oracle@16" in done.out
    assert "T(n)" in done.out
    assert done.err == ""


def test_outputs_that_may_not_differ_exit_with_1(paceline, toy, prompts):
    toy.engine = Broken(length=14, nudge=9.0)
    done = paceline("bench", "toy", "--prompts", prompts, *SMALL)
    assert done.code == 1
    assert "outputs differ from plain decoding" in done.err
    toy.engine.invariant = False
    assert paceline("bench", "toy", "--prompts", prompts, *SMALL).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "4,x"), "expected 0 to 4096 nodes, or auto"),
        (("--budget", "9999"), "expected 0 to 4096 nodes, or auto"),
        (("--repeat", "0"), "--repeat"),
        (("--repeat", "1000000000"), "--repeat"),
        (("--state", "frozen"), "--state"),
        (("--temperature", "nan"), "temperature"),
        (("--budget", ""), "expected 0 to 4096 nodes, or auto"),
        (("--budget", "8,-1"), "expected 0 to 4096 nodes, or auto"),
        (("--suite", "spec-banch"), "no suite 'spec-banch'; known: spec-bench"),
        (("--suite", "spec-bench"), "line 1 has the category 'text'"),
        (("--tasks", "qa,poems"), "no task 'poems'; it has text, qa"),
        (("--tasks", ""), "no task ''"),
        (("--html", "/nowhere/at/all.html"), "there is no folder"),
        (("--html", "."), "it is not a file"),
        (("--out", "a.json", "--html", "./a.json"), "give two names"),
        (("--max-new-tokens", "1000000000000"), "expected 1 to 63"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(paceline, toy, prompts, words, said):
    done = paceline("bench", "toy", "--prompts", prompts, *SMALL, *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1

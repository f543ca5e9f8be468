"""Tasks of lm-evaluation-harness in `paceline eval`; in an environment that has it."""

import json

import pytest

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'paceline[harness]'"
)

from paceline.errors import RequestError
from paceline.measuring.evaluation.lm_harness import run_task
from tests.cli.conftest import paceline  # noqa: F401 (a fixture)
from tests.conftest import shared

pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [
    {"sentence_good": "The cats play.", "sentence_bad": "The cats plays.", "UID": "one"},
    {"sentence_good": "Tom has a cat.", "sentence_bad": "Tom have a cat.", "UID": "two"},
    {"sentence_good": "Lily is here.", "sentence_bad": "Lily are here.", "UID": "two"},
]


def test_a_task_has_the_accuracy_of_the_same_suite(tmp_path, paceline, monkeypatch):  # noqa: F811
    data = tmp_path
    monkeypatch.setenv("HF_HOME", str(data / "hub"))
    (data / "lm_eval").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in PAIRS)
    for name in ("blimp.jsonl", "pairs.jsonl"):
        (data / name).write_text(lines)
    task = {
        "task": "local_pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data / "pairs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (data / "lm_eval" / "local_pairs.yaml").write_text(json.dumps(task))
    model = shared("models", "stories260K")
    words = ("eval", model, "--suite", "lm_eval:local_pairs", "--suite", "blimp", "--data", data)
    refused = paceline(*words)
    assert refused.code == 2
    assert "may run Python code; allow it with --allow-code" in refused.err
    done = paceline(*words, "--base", model, "--base-format", "int8", "--allow-code", "--json")
    assert done.code == 0, done.err
    blimp, harness = json.loads(done.out[done.out.index("{") :])["suites"]
    assert harness["metrics"]["acc"]["value"] == blimp["metrics"]["accuracy"]["value"]
    assert set(harness["paired"]["metrics"]) == {"acc"}
    with pytest.raises(RequestError, match="has no single task 'nothing'"):
        run_task(None, "nothing", None, 0)

"""`paceline eval`: whole runs on small models, and what is refused in one sentence."""

import gzip
import json

import pytest

from paceline.measuring.evaluation.lm_harness import TaskScores, compare_tasks
from paceline.measuring.significance import Estimate
from tests.conftest import shared
from tests.real_models import real_file

STORY = "Once upon a time, a girl named Lily found a {} cat in the park. She was happy.\n"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "blimp").mkdir()
    (tmp_path / "lambada").mkdir()
    pairs = [
        {"sentence_good": "The cats play.", "sentence_bad": "The cats plays.", "UID": "one"},
        {"sentence_good": "Tom has a cat.", "sentence_bad": "Tom have a cat.", "UID": "two"},
        {"sentence_good": "Lily is here.", "sentence_bad": "Lily are here.", "UID": "two"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in pairs)
    (tmp_path / "blimp" / "blimp.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    words = [{"text": STORY.format(word).strip()} for word in ("big", "small")]
    lines = "".join(json.dumps(row) + "\n" for row in words)
    (tmp_path / "lambada" / "lambada_test.jsonl").write_text(lines)
    (tmp_path / "story.txt").write_text("".join(STORY.format(i) for i in range(160)))
    return tmp_path


def test_a_model_against_itself_in_fewer_bits(data, paceline):
    model, out = shared("models", "stories260K"), data / "found.json"
    words = (
        *("eval", model, "--format", "int4", "--base", model, "--text", data / "story.txt"),
        *("--suite", "blimp", "--suite", "lambada", "--data", data, "--limit", 3),
    )
    done = paceline(*words, "--out", out, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found == json.loads(out.read_text())
    assert found["engine"]["format"].startswith("int4")
    assert found["base"]["engine"]["format"] == "fp32"
    text, blimp, lambada = found["suites"]
    assert [each["suite"] for each in found["suites"]] == ["story.txt", "blimp", "lambada"]
    assert [each["items"] for each in found["suites"]] == [3, 3, 2]
    nats = text["paired"]["metrics"]["nats a token"]
    assert nats["difference"] == pytest.approx(
        text["metrics"]["nats a token"]["value"] - text["base"]["metrics"]["nats a token"]["value"]
    )
    assert nats["error"] > 0
    assert 0 < nats["p"] <= 1
    assert 0 < nats["permutation_p"] <= 1
    assert 0 < text["paired"]["equal_most_likely"] <= 1
    assert set(blimp["groups"]) == {"one", "two"}
    assert blimp["settings"] == {"prefix": "<s>"}
    assert set(blimp["paired"]["metrics"]["accuracy"]) == {
        *("difference", "error", "won", "lost", "p")
    }
    assert lambada["metrics"]["nats of the last word"]["value"] > 0
    again = paceline(*words)
    assert again.code == 0
    assert "8 items were scored by an earlier run" in again.err
    assert "paired difference" in again.out
    assert "equal most likely tokens" in again.out


def test_models_with_different_tokenizers_are_compared_in_bits_a_byte(data, paceline):
    one, other = shared("models", "stories260K"), shared("models", "TinyStories-656K")
    found = paceline("eval", one, "--base", other, "--text", data / "story.txt", "--json").json
    [text] = found["suites"]
    assert list(text["metrics"]) == ["bits a byte"]
    assert text["settings"]["prefix"] != text["base"]["settings"]["prefix"]
    assert text["paired"]["metrics"]["bits a byte"]["error"] > 0


REFUSED = [
    ((), "give --text FILE or --suite NAME"),
    (("--suite", "blimb", "--data", "{}"), "unknown suite 'blimb'; did you mean blimp"),
    (("--suite", "blimp"), "name their folder with --data"),
    (("--suite", "blimp", "--data", "{}/nowhere"), "there is no folder"),
    (("--suite", "gsm8k", "--data", "{}"), "has no data of gsm8k"),
    (("--suite", "mbpp", "--data", "{}"), "allow it with --allow-code"),
    (("--suite", "blimp", "--data", "{}", "--shots", 2), "--shots is of --suite gsm8k or mbpp"),
    (("--suite", "blimp", "--data", "{}", "--chat"), "--chat is of --suite gsm8k or mbpp"),
    (("--text", "{}/story.txt", "--prefix", "none"), "--prefix is of --suite babilong"),
    (("--text", "{}/story.txt", "--data", "{}"), "--data is of --suite"),
    (("--text", "{}/story.txt", "--allow-code"), "--allow-code is of --suite"),
    (("--text", "{}/story.txt", "--base-format", "int8"), "--base-format is of --base"),
    (("--text", "{}/story.txt", "--base", "{}/nowhere"), "nowhere"),
    (("--text", "{}/nowhere.txt"), "cannot read"),
    (("--text", "{}/short.txt"), "has"),
    (("--suite", "blimp", "--data", "{}", "--prefix", "<x>"), "no token '<x>' for --prefix"),
    (("--suite", "blimp", "--data", "{}", "--limit", 0), "--limit"),
    (("--text", "{}/story.txt", "--out", "{}/nowhere/x.json"), "there is no folder"),
    (("--text", "{}/story.txt", "--attention", "nothing"), "nothing"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_is_refused(data, paceline, words, said):
    (data / "short.txt").write_text("Short.")
    given = [str(word).replace("{}", str(data)) for word in words]
    done = paceline("eval", shared("models", "stories260K"), *given)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_chats_take_no_examples(data, paceline):
    done = paceline(
        *("eval", shared("models", "stories260K"), "--suite", "gsm8k", "--data", data),
        *("--chat", "--shots", 3),
    )
    assert done.code == 2
    assert "asks without examples" in done.err


def test_tasks_need_the_harness(data, paceline, monkeypatch):
    monkeypatch.setattr("paceline.measuring.evaluation.lm_harness.find_spec", lambda name: None)
    done = paceline("eval", shared("models", "stories260K"), "--suite", "lm_eval:piqa")
    assert done.code == 2
    assert "pip install 'paceline[harness]'" in done.err


def test_tasks_are_paired_by_document():
    ours = TaskScores({"acc": Estimate(0.5, 0.1)}, {"acc": [1.0, 0.0, 1.0], "ppl": [3.0, 2.5]}, 3)
    base = TaskScores({"acc": Estimate(0.5, 0.1)}, {"acc": [0.0, 0.0, 1.0], "ppl": [2.0, 2.0]}, 3)
    found = compare_tasks(ours, base, 0)
    assert found["acc"]["won"] == 1
    assert found["acc"]["lost"] == 0
    assert found["ppl"]["difference"] == pytest.approx(0.75)
    assert found["ppl"]["permutation_p"] == 0.5


@pytest.mark.real
def test_a_real_model_tells_grammatical_sentences(paceline):
    model, data = real_file("smollm2-135m"), shared("data")
    found = paceline("eval", model, "--suite", "blimp", "--data", data, "--limit", 1, "--json").json
    [blimp] = found["suites"]
    assert blimp["items"] == 67
    assert blimp["metrics"]["accuracy"]["value"] > 0.6
    assert blimp["settings"] == {"prefix": "none"}
    marked = paceline(
        *("eval", model, "--suite", "blimp", "--data", data, "--limit", 1, "--json"),
        *("--prefix", "<|im_start|>"),
    ).json
    assert marked["suites"][0]["settings"] == {"prefix": "<|im_start|>"}
    assert marked["suites"][0]["metrics"]["accuracy"]["value"] < 0.8

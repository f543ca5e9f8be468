import re

import pytest

from paceline.cli.files import OPENING
from paceline.cli.generate import CHAT_HINT
from paceline.core import Cost
from paceline.decoding.governor import Governor
from paceline.models.hub import EMBEDDED
from tests.conftest import shared
from tests.measuring.toy_lm import Broken, Letters
from tests.toy import Oracle

KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "cached_tokens",
    "new_tokens",
    "passes",
    "tokens_per_pass",
    "seconds",
    "tokens_per_second",
    "finish",
    "tool_calls",
    "prompt_filter",
    "engine",
    "format",
    "kv_format",
    "kv_policy",
    "documents",
    "drafter",
    "budget",
    "governor",
    "temperature",
    "seed",
    "walk",
    "lossy",
    "watermark",
}


def test_text_goes_to_stdout_and_one_line_to_stderr(paceline, toy):
    done = paceline("generate", "Once", "--max-new-tokens", 20)
    assert done.code == 0
    text, end = done.out[:-1], done.out[-1]
    assert end == "\n"
    assert len(text) == 20
    assert done.err.count("\n") == 1
    assert done.err.startswith("20 tokens, ")
    assert "tokens/s, 5.00 tokens per pass, " in done.err
    assert done.err.endswith("% of the time drafting\n")


def test_json_is_one_document_with_the_same_text(paceline, toy):
    words = ("generate", "Once", "--max-new-tokens", 20, "--seed", 3, "--temperature", 0.9)
    done, shown = paceline(*words, "--json"), paceline(*words)
    found = done.json
    assert set(found) == KEYS
    seconds = found["seconds"]
    assert set(seconds) == {"load", "prefill", "decode", "draft", "guide", "forward", "walk"}
    assert 0 < seconds["draft"] + seconds["forward"] + seconds["walk"] < seconds["decode"]
    assert found["text"] + "\n" == shown.out
    assert found["text"] == Letters().decode(found["tokens"])
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 20)
    assert (found["engine"], found["drafter"], found["budget"]) == ("toy", "blend", "auto")
    assert (found["temperature"], found["seed"], found["finish"]) == (0.9, 3, "length")


def test_prompt_from_stdin_or_the_default_opening(paceline, toy):
    words = ("generate", "--json", "--max-new-tokens", 5)
    assert paceline(*words, "-", stdin="Once").json["text"] == paceline(*words, "Once").json["text"]
    assert paceline(*words).json["prompt_tokens"] == len(OPENING)


def test_what_is_lossy_is_named(paceline):
    words = ("generate", "Once", "--max-new-tokens", 4, "--kv-policy", "sliding_window")
    assert "the KV policy sliding_window is lossy" in paceline(*words).err


def test_check_compares_with_plain_decoding(paceline, toy):
    done = paceline("generate", "Once", "--check", "--max-new-tokens", 20)
    assert done.code == 0
    said = r"identical to plain decoding, at \d+\.\d\d times its speed"
    assert re.fullmatch(said, done.err.splitlines()[-1])
    found = paceline("generate", "Once", "--check", "--max-new-tokens", 20, "--json").json
    assert found["check"]["identical"] is True


def test_check_tells_the_first_difference(paceline, toy):
    toy.engine = Broken(length=10, nudge=9.0)
    done = paceline("generate", "Once", "--check", "--max-new-tokens", 20, "--json")
    assert done.code == 1
    first = done.json["check"]["first"]
    assert (first["position"], first["verdict"]) == (6, "bug")
    assert "differs from plain decoding at new token 6" in done.err


def test_an_interrupt_keeps_the_text_and_exits_with_130(paceline, toy):
    class Impatient(Oracle):
        def propose(self, context, budget, min_path_prob=0.0):
            if len(context) > 10:
                raise KeyboardInterrupt
            return super().propose(context, budget, min_path_prob)

    toy.drafter = Impatient(toy.engine)
    done = paceline("generate", "Once", "--max-new-tokens", 20, "--check")
    assert done.code == 130
    assert len(done.out) > 4
    assert "; interrupted\n" in done.err
    found = paceline("generate", "Once", "--max-new-tokens", 20, "--json")
    assert (found.code, found.json["finish"]) == (130, "interrupted")


def test_the_sampler_sets_controls_and_temperature(paceline, toy):
    done = paceline("generate", "Once", "--sampler", "top_k=1,temperature=2", "--json")
    greedy = paceline("generate", "Once", "--json").json
    assert done.json["temperature"] == 2
    assert done.json["text"] == greedy["text"]


def test_a_stop_string_and_the_end_of_the_context(paceline, toy):
    text = paceline("generate", "Once", "--json", "--max-new-tokens", 20).json["text"]
    stopped = paceline("generate", "Once", "--json", "--stop", text[5:8]).json
    assert (stopped["text"], stopped["finish"]) == (text[: text.find(text[5:8])], "stop")
    full = paceline("generate", "Once", "--max-new-tokens", 10**15)
    assert (full.code, len(full.out)) == (0, 61)
    assert full.err.endswith("; the model's context is full\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("",), "the prompt is empty"),
        (("x" * 64,), "the prompt has 64 tokens, but the model sees 64"),
        (("Once", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("Once", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("Once", "--temperature", "-1"), "temperature is -1"),
        (("Once", "--temperature", "nan"), "temperature is nan"),
        (("Once", "--temperature", "inf"), "temperature is inf"),
        (("Once", "--budget", "5000"), "--budget"),
        (("Once", "--threads", "0"), "--threads"),
        (("Once", "--sampler", "warmth=1"), "unknown control 'warmth'"),
        (("Once", "--temperature", "1", "--sampler", "temperature=2"), "give one of them"),
        (("Once", "--stop", ""), "--stop is empty"),
        (("Once", "--chat"), "no chat template"),
        (("Once", "--sead", "1"), "--sead"),
        (("Once", "upon"), "upon"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(paceline, toy, words, said):
    done = paceline("generate", *words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("paceline: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    found = paceline("generate", *words, "--json")
    assert (found.code, list(found.json)) == (2, ["error"])
    assert said in found.json["error"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--engine", "magic"), "unknown engine 'magic'"),
        (("--device", "cuda", "--engine", "native"), "device=cuda do not go together"),
        (("--threads", "2", "--engine", "reference"), "threads=2 do not go together"),
        (("--drafter", "playn"), "did you mean plain"),
    ],
)
def test_models_engines_and_drafters_that_do_not_exist(paceline, words, said):
    model = shared("models", "stories260K")
    done = paceline("generate", "--model", model, "--drafter", "plain", *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_governor_says_what_it_did_and_why(paceline, toy):
    toy.budget = Governor(Cost((1, 8), (1e-6, 1.0)))
    done = paceline("generate", "Once", "--budget", "auto", "--max-new-tokens", 20)
    said = "budget auto: 20 of 20 passes plain; plain: no tree can pay, 2 nodes cost "
    assert done.err.splitlines()[-1].startswith(said)
    toy.budget = Governor(Cost((1, 8, 64), (1.0, 1.0, 1.0)))
    done = paceline("generate", "Once", "--budget", "auto", "--max-new-tokens", 20, "--json")
    drafted = [int(size) for size in done.json["governor"]["sizes"] if size != "1"]
    assert f"passes plain, trees of up to {max(drafted)} nodes; drafting: " in done.err
    assert done.json["governor"]["reason"].startswith("drafting: best expected ")


def test_a_prediction_makes_it_faster_and_not_different(paceline, tmp_path):
    words = (
        "generate", "Once upon a time", "--model", shared("models", "stories260K"),
        "--max-new-tokens", 40, "--temperature", 0, "--budget", 16, "--json",
    )  # fmt: skip
    expected = paceline(*words, "--drafter", "plain").json
    path = tmp_path / "expected.txt"
    path.write_text(expected["text"].replace("time", "tune"))
    done = paceline(*words, "--drafter", "predicted_output", "--prediction", path).json
    assert done["tokens"] == expected["tokens"]
    assert done["passes"] <= 10


def test_predictions_that_cannot_be_used_are_refused(paceline, tmp_path, toy):
    path = tmp_path / "expected.txt"
    for content, message in ((b"\xff", "not UTF-8"), (b"", "empty"), (b"abc", "nothing reads")):
        path.write_bytes(content)
        done = paceline("generate", "Once", "--prediction", path)
        assert done.code == 2
        assert message in done.err
    path.unlink()
    assert "cannot read" in paceline("generate", "Once", "--prediction", path).err


def test_the_rejection_walk_needs_a_draft_model_and_cannot_be_checked(paceline, toy):
    words = ("generate", "Once", "--walk", "rejection", "--temperature", "1")
    done = paceline(*words)
    assert (done.code, done.out) == (2, "")
    assert "the drafter oracle do not go together" in done.err
    done = paceline(*words, "--check")
    assert done.code == 2
    assert "--walk rejection and --check do not go together" in done.err
    assert paceline("generate", "Once", "--walk", "moon").code == 2


def test_what_was_learnt_is_kept_and_read_again(paceline, tmp_path):
    path = tmp_path / "learnt"
    words = (
        "generate", "Once upon a time", "--model", shared("models", "stories260K"),
        "--max-new-tokens", 60, "--temperature", 0, "--budget", 8, "--json", "--learnt", path,
    )  # fmt: skip
    first, second = paceline(*words).json, paceline(*words).json
    assert first["tokens"] == second["tokens"]
    assert second["passes"] < first["passes"]
    assert list(tmp_path.iterdir()) == [path]
    wrong = paceline(*words, "--drafter", "lookup")
    assert wrong.code == 2
    assert str(path) in wrong.err
    path.write_bytes(b"no tensors")
    assert paceline(*words).code == 2
    assert path.read_bytes() == b"no tensors"
    plain = paceline(*words, "--drafter", "plain")
    assert plain.code == 2
    assert "learns nothing" in plain.err
    assert paceline(*words[:-1], tmp_path / "no" / "folder").code == 2


def test_tools_are_read_from_a_file(paceline, tmp_path):
    pytest.importorskip("llguidance")
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "clock"}]')
    words = ("generate", "Once", "--tools", path, "--json")
    done = paceline(*words, "--tool-choice", "required")
    assert done.json["tool_calls"] == [{"name": "clock", "arguments": {}}]
    assert done.json["text"] == '{"name": "clock", "arguments": {}}'
    assert paceline(*words, "--max-new-tokens", 4).json["tool_calls"] == []


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ("{}", ["--tool-choice", "auto"], "no JSON list"),
        ("[", [], "is not JSON"),
        (None, [], "cannot read the tools"),
        ('[{"name": "f"}]', ["--tool-choice", "g"], "unknown tool 'g'"),
        ('[{"name": "f"}]', ["--chat"], "chat template"),
    ],
)
def test_bad_tools_are_refused(paceline, tmp_path, content, words, said):
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    done = paceline("generate", "Once", "--tools", path, *words)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_tool_choice_needs_tools(paceline):
    done = paceline("generate", "Once", "--tool-choice", "required")
    assert done.code == 2
    assert "name a file" in done.err


def test_shorthands_of_samplers_are_the_samplers(paceline):
    words = ("generate", "Once", "--json", "--max-new-tokens", 12, "--temperature", 1, "--seed", 5)
    short = ("--top-p", 0.5, "--top-k", 9, "--min-p", 0.01, "--repetition-penalty", 1.2)
    sampler = "top_p=0.5,top_k=9,min_p=0.01,repetition_penalty=1.2"
    text = paceline(*words, "--sampler", sampler).json["text"]
    assert paceline(*words, *short).json["text"] == text
    assert paceline(*words, *short, "--sampler", sampler).json["text"] == text
    done = paceline(*words, "--top-k", 9, "--sampler", "top_k=8")
    assert (done.code, done.json) == (
        2, {"error": "--top-k is 9 and --sampler has another top_k; give one"}
    )  # fmt: skip
    assert "top_p" in paceline(*words, "--top-p", 3).err


def test_a_hostile_template_is_refused_in_one_sentence(paceline, tmp_path):
    for file in shared("models", "stories260K").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' * 3000000000 }}")
    done = paceline("generate", "hi", "--model", tmp_path, "--chat")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("paceline: the chat template needs more than 1024 MB")
    assert done.err.count("\n") == 1


def test_a_chat_model_is_told_of_chat_once(paceline, tmp_path):
    for file in EMBEDDED.iterdir():
        (tmp_path / file.name).symlink_to(file)
    words = ("generate", "Once", "--model", tmp_path, "--max-new-tokens", 4)
    assert CHAT_HINT not in paceline(*words).err
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert paceline(*words).err.splitlines().count(CHAT_HINT) == 1
    assert CHAT_HINT not in paceline(*words, "--chat").err

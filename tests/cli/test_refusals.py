"""Wrong command lines: one sentence, exit 2, nothing on stdout."""

import json

import pytest

from tests.conftest import shared


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to be in, with files of all kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Once", "answer": "a"}))
    return tmp_path


def refused(done, said):
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("paceline: ")
    assert done.err.count("\n") == 1
    assert said in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", ""), "expected a folder with config.json"),
        (("--model", "folder"), "cannot read folder/config.json"),
        (("--model", "bytes"), "is no GGUF file"),
        (("--model", "\udcff"), "does not exist"),
        (("--model", "|"), "lacks a model"),
        (("--drafter", ""), "unknown drafter"),
        (("--drafter", "model:path=folder"), "cannot read folder/config.json"),
        (("--drafter", "recycle:k=99999999999999999999"), "expected 1 to 32"),
        (("--budget", "1e3"), "expected 0 to 4096"),
        (("--engine", "gpu"), "unknown engine"),
        (("--engine", "native", "--device", ""), "it runs on the CPU"),
        (("--device", "", "--threads", "2"), "threads=2 do not go together"),
        (("--format", ""), "unknown format"),
        (("--kv-format", "fp8"), "fp8"),
        (("--threads", "-1"), "--threads"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--temperature", "1e400"), "temperature is inf"),
        (("--seed", "1.5"), "--seed"),
        (("--sampler", "="), "unknown control"),
        (("--sampler", "min_p=nan"), "min_p is nan"),
        (("--guide", ""), "unknown guide"),
        (("--json-schema", "folder"), "Is a directory"),
        (("--json-schema", "bytes"), "not UTF-8 text"),
        (("--grammar", "missing"), "No such file"),
        (("--choice", "|"), "not empty"),
        (("--choice", "a", "--regex", "b"), "give one of"),
        (("--keywords", ","), "is empty"),
        (("--hmm", "bytes"), "add --keywords"),
        (("--tools", "empty"), "is not JSON"),
        (("--tool-choice", ""), "--tool-choice is ''"),
        (("--watermark", "key="), "key is empty"),
        (("--watermark", "key=\udcff"), "half a character"),
        (("--walk", ""), "expected gumbel or rejection"),
        (("--strategy", "beam:width=0"), "1 to 1024"),
        (("--stop", ""), "--stop is empty"),
        (("--stop", "\udcff"), "not UTF-8 text"),
        (("--learnt", "missing/learnt"), "there is no folder"),
        (("--learnt", "folder"), "it is not a file"),
        (("--prediction", "bytes"), "not UTF-8 text"),
        (("--prediction", "empty"), "is empty"),
        (("\udcff",), "half a character"),
        (("",), "the prompt is empty"),
        (("one", "two"), "put it in quotes"),
    ],
)
def test_generate(paceline, files, words, said):
    refused(paceline("generate", *words), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "nan"), "temperature is nan"),
        (("--guide", "nope"), "unknown guide"),
        (("--regex", "("), "the grammar cannot be used"),
        (("--walk", "x"), "expected gumbel or rejection"),
        (("--template", "\udcff{user}"), "half a character"),
        (("--template", "User:"), "expected {user}"),
    ],
)
def test_chat_refuses_before_anyone_types(paceline, files, words, said):
    refused(paceline("chat", "--template", "{user}", *words, stdin=""), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("complete", "-n", "0"), "-n"),
        (("complete", "--alpha", "nan"), "--alpha"),
        (("complete", "--method", ""), "expected beam or superposed"),
        (("complete", "once " * 9999), "but the model sees"),
        (("batch", "folder", "out"), "not a file"),
        (("batch", "empty", "out"), "has no line"),
        (("batch", "one.jsonl", "folder"), "it is not a file"),
        (("batch", "one.jsonl", "out", "--name", ""), "--name is empty"),
        (("batch", "one.jsonl", "out", "--replicas", "2"), "name it with --ray"),
        (("load-test", "http://127.0.0.1:1", "--prompts", "one.jsonl"), "give one of a rate"),
        (("load-test", "", "--prompts", "one.jsonl", "--users", "1"), "is not an address"),
        (
            ("load-test", "http://x", "--prompts", "one.jsonl", "--rate", "1", "--seed", "-1"),
            "--seed",
        ),
        (("prove", "", "--prompts", "folder"), "Is a directory"),
        (("prove", "", "--prompts", "one.jsonl", "--temperatures", "nan"), "expected a number"),
        (("bench", "", "--prompts", "bytes"), "not UTF-8 text"),
        (("bench", "", "--prompts", "one.jsonl", "--html", "missing/x"), "there is no folder"),
        (("index-corpus", "", "missing", "out"), "not a file"),
        (("inflate", "", "out", "--hidden", "8"), "Missing option"),
        (("warm", "--seed", "-1"), "--seed"),
        (("warm", "--kv-format", "fp8"), "fp8"),
        (("distil-hmm", "", "out", "--seed", "-1"), "--seed"),
        (("train-head", "", "out", "--tokens", "10"), "--tokens"),
        (("train-head", "", "out", "--seed", "-1"), "--seed"),
        (("tune-sampling", "one.jsonl", "--seed", "-1"), "--seed"),
        (("tune-sampling", "bytes"), "UTF-8"),
        (("tune-sampling", "x", "--scorer", "command", "--command", "'open"), "is not a command"),
        (("methods", "extra"), "unknown family"),
        (("methods", "a", "b", "extra"), "extra argument"),
        (("doctor", "--threads", "0"), "--threads"),
        (("watermark", "detect", "-", "--watermark", "key=a"), "0 tokens of the text"),
        (("watermark", "detect", "bytes", "--watermark", "key=a"), "not UTF-8 text"),
        (("watermark", "detect", "one.jsonl", "--watermark", "key=\udcff"), "half a character"),
        (("serve", "--budget", "x"), "--budget is 'x'"),
        (("serve", "--config", "folder"), "Is a directory"),
    ],
)
def test_other_verbs(paceline, files, words, said):
    refused(paceline(*words), said)


def test_a_judge_that_cannot_be_run_is_refused(files, capfd, paceline):
    model = shared("models", "stories260K")
    words = ("--scorer", "command", "--command", "/missing/judge", "--model", model)
    refused(paceline("tune-sampling", "one.jsonl", *words, "--tokens", "1..2"), "cannot be run")
    assert "not found" in capfd.readouterr().err  # the shell's own words

"""The grammar options on every verb that writes."""

import json

import pytest

from paceline.models.hub import EMBEDDED

pytest.importorskip("llguidance")

SCHEMA = {"enum": [{"name": "Ann"}, {"name": "Bob"}]}


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("Once\nThere was\n")
    return path


def test_chat_answers_follow_it(paceline, schema):
    words = ("chat", "--template", r"User: {user}\nBot:", "--json", "--json-schema", schema)
    found = paceline(*words, stdin="hello\nbye\n").json["turns"]
    assert all(json.loads(turn["text"]) in SCHEMA["enum"] for turn in found)
    assert [turn["finish"] for turn in found] == ["stop", "stop"]


def test_what_follows_it_is_proven(paceline, lines, schema):
    words = ("--drafters", "forced,blend,hostile", "--temperatures", "0,1", "--json")
    done = paceline("prove", EMBEDDED, "--prompts", lines, *words, "--json-schema", schema)
    assert done.code == 0
    assert (done.json["identical"], done.json["pairs"]) == (12, 12)
    assert done.json["settings"]["grammar"] == {"text": json.dumps(SCHEMA), "kind": "json"}


def test_what_follows_it_is_measured_to_its_end(paceline, lines):
    words = ("--drafters", "forced", "--budget", "8", "--repeat", 1, "--json")
    text = "the same text"
    done = paceline("bench", EMBEDDED, "--prompts", lines, *words, "--choice", text)
    assert done.code == 0
    found = done.json
    assert found["settings"]["ignore_eos"] is False
    plain, forced = found["arms"]
    assert plain["tokens_per_pass"] == 1.0
    assert forced["tokens_per_pass"] > 3
    assert forced["different"] == 0


@pytest.mark.parametrize("verb", ["generate", "chat", "prove", "bench"])
def test_a_wrong_grammar_is_refused(paceline, lines, verb):
    needed = {"prove": [EMBEDDED, "--prompts", lines], "bench": [EMBEDDED, "--prompts", lines]}
    start = [verb, *needed.get(verb, [])]
    if verb == "chat":
        start += ["--template", "{user}:"]
    for words, said in (
        (["--regex", "a("], "unclosed group"),
        (["--regex", "a", "--choice", "b"], "follows one"),
        (["--grammar", "no/file"], "cannot read"),
    ):
        done = paceline(*start, *words)
        assert done.code == 2
        assert said in done.err

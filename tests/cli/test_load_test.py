import pytest

from tests.measuring.fake_server import answer, piece, serving, sse


def script(number, body):
    if body is None:
        return answer(b'{"data": [{"id": "tiny"}]}')
    if number == 3:
        return answer(b'{"error": {"message": "too many"}}', 429)
    return answer(sse(piece("Once", usage={"completion_tokens": 3}), piece(" upon", "stop")))


def test_load_asks_every_prompt_once(paceline, prompts):
    with serving(script) as fake:
        done = paceline("load-test", fake.url, "--prompts", prompts, "--users", 1, "--json")
    assert done.code == 0
    found = done.json
    assert (found["requests"], found["completed"], found["tokens"]) == (2, 2, 6)
    assert found["settings"]["model"] == "tiny"
    assert [body["prompt"] for _, _, body in fake.asked[1:]] == ["Once upon", "One"]
    assert [body["seed"] for _, _, body in fake.asked[1:]] == [0, 1]


def test_load_goes_on_at_a_rate_and_tells_of_failures(paceline, prompts, monkeypatch):
    monkeypatch.setenv("TINY_KEY", "secret")
    words = ["--rate", 500, "--requests", 5, "--chat", "--model", "m", "--body", '{"top_p": 0.5}']
    more = ["--slo-ttft", 60, "--temperature", 0, "--key-variable", "TINY_KEY"]
    with serving(script) as fake:
        done = paceline("load-test", fake.url, "--prompts", prompts, *words, *more)
    assert done.code == 0
    assert "4 of 5 answered" in done.out
    assert "errors: 429: 1" in done.out
    assert "in time: 80.0%" in done.out
    assert "the first with 429: too many" in done.err
    assert "secret" not in done.out + done.err
    assert all(fields["authorization"] == "bearer secret" for _, fields, _ in fake.asked)
    assert all(body["top_p"] == 0.5 and "messages" in body for _, _, body in fake.asked)


def test_a_suite_needs_no_file(paceline):
    with serving(lambda *_: answer(sse(piece("Once", "stop")))) as fake:
        words = ["--users", 4, "--model", "m", "--json", "--suite", "spec-bench"]
        done = paceline("load-test", fake.url, *words)
        assert done.code == 0
        assert done.json["settings"]["suite"] == "spec-bench"
        assert 10 <= done.json["settings"]["prompts"] <= 24


def test_a_server_that_answers_nothing_ends_with_1(paceline, prompts):
    with serving(lambda *_: answer(b"{}", 500)) as fake:
        words = ["--prompts", prompts, "--users", 2, "--model", "m"]
        assert paceline("load-test", fake.url, *words).code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of a rate"),
        (["--users", 1, "--rate", 1], "give one of a rate"),
        (["--rate", 0], "--rate is 0"),
        (["--rate", "nan"], "--rate is nan"),
        (["--users", 1, "--body", "[]"], "expected a JSON object"),
        (["--users", 1, "--suite", "other"], "no suite 'other'"),
    ],
)
def test_what_cannot_be_is_refused(paceline, prompts, words, message):
    done = paceline("load-test", "http://127.0.0.1:1", "--model", "m", "--prompts", prompts, *words)
    assert done.code == 2
    assert message in done.err


def test_nobody_there(paceline, prompts):
    done = paceline("load-test", "http://127.0.0.1:1", "--prompts", prompts, "--users", 1)
    assert done.code == 2
    assert "cannot reach" in done.err

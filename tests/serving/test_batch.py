"""A file of requests: each answered as it would be alone, in order, whatever the others are."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.kvcache.base import parse_policy
from paceline.serving import batch
from paceline.serving.batch import BatchSettings, InputLine, read_lines, run_batch, summarize_input
from paceline.serving.worker import Worker

PROMPTS = ("Once upon a time", "The dog and the cat", "Lily wanted to", "One day, a boy named Tom")
GOOD = {"prompt": "Once", "max_tokens": 3}


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="blend")


@pytest.fixture
def worker(lm):
    found = Worker(lm, max_running=4, queue=10**6)
    yield found
    found.close()
    assert lm.engine.memory.used == 0


def run(worker, rows, **options):
    texts = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    lines = [InputLine(number, text) for number, text in enumerate(texts, 1)]
    return [line for _, line in run_batch(worker, lines, BatchSettings("tiny", **options))]


def alone(lm, prompt, **options):
    """What plain decoding gives."""
    plain, lm.budget = lm.budget, Fixed(0)
    found = lm.generate(prompt, **options).text
    lm.budget = plain
    return found


def text(line):
    return line["response"]["body"]["choices"][0]["text"]


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_each_line_is_answered_as_plain_decoding_does(lm, data):
    row = st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(PROMPTS),
            "max_tokens": st.integers(1, 25),
            "temperature": st.sampled_from([0.0, 0.9]),
            "seed": st.integers(0, 3),
        }
    )
    rows = data.draw(st.lists(row | st.just({}), min_size=1, max_size=12))
    worker = Worker(lm, max_running=data.draw(st.integers(1, 4)), queue=10**6)
    found = run(worker, rows)
    worker.close()
    assert [line["custom_id"] for line in found] == [f"line-{n + 1}" for n in range(len(rows))]
    for asked, line in zip(rows, found, strict=True):
        if not asked:
            assert line["error"]["code"] == "invalid_request"
            continue
        prompt, options = asked["prompt"], {k: v for k, v in asked.items() if k != "prompt"}
        expected = alone(lm, prompt, max_new_tokens=options.pop("max_tokens"), **options)
        assert text(line) == expected


def test_a_line_may_name_a_kv_policy_of_its_own(worker, lm):
    policy = "sliding_window:budget=16,sinks=2,every=4"
    row = {"prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0.0}
    rows = [row | {"kv_policy": value} for value in (policy, False, "h20")]
    bounded, whole, wrong = run(worker, rows)
    options = {"max_new_tokens": 40, "temperature": 0.0}
    assert text(bounded) == alone(lm, PROMPTS[0], kv_policy=policy, **options)
    assert text(whole) == alone(lm, PROMPTS[0], **options) != text(bounded)
    assert "did you mean h2o" in json.dumps(wrong)
    lm.request_builder.kv_policy = parse_policy(policy)  # as `paceline batch --kv-policy` opens it
    try:
        by_default, all_rows = run(worker, [row, row | {"kv_policy": False}])
    finally:
        lm.request_builder.kv_policy = None
    assert (text(by_default), text(all_rows)) == (text(bounded), text(whole))


def test_null_is_not_given_in_a_line(worker):
    null = {"custom_id": None, "url": None, "metadata": None, "never_heard_of": None}
    [line], [plain] = run(worker, [GOOD | null]), run(worker, [GOOD])
    assert (line["custom_id"], text(line)) == ("line-1", text(plain))


def test_openais_lines_and_short_ones_get_the_same(worker):
    body = GOOD | {"model": "tiny", "n": 2, "temperature": 1.0}
    long = {"custom_id": "mine", "method": "POST", "url": "/v1/completions", "body": body}
    first, second = run(worker, [long, body | {"custom_id": "short"}])
    assert (first["custom_id"], second["custom_id"]) == ("mine", "short")
    for line in (first, second):
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["object"] == "text_completion"
        assert line["response"]["body"]["usage"]["completion_tokens"] == 6
    choices = [line["response"]["body"]["choices"] for line in (first, second)]
    assert choices[0] == choices[1]
    assert [choice["index"] for choice in choices[0]] == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a JSON object"),
        ({}, "none of url and body"),
        ({"prompt": "Once", "colour": 1}, "colour: is not a parameter"),
        ({"prompt": "Once", "max_tokens": "3"}, "max_tokens: "),
        ({"prompt": [[1], ["a"]]}, "prompt.1.0: Input should be a valid integer"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages.0.content: Input should be a valid string or a valid list",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content: this model reads text only, no images",
        ),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": []}, "empty list"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": [10**9]}, "outside"),
        ({"prompt": "Once", "model": "gpt"}, "no model 'gpt' here, only 'tiny'"),
        ({"prompt": "Once", "stream": True}, "supports neither stream"),
        ({"prompt": "Once", "custom_id": 7}, "custom_id is 7"),
        ({"prompt": "Once", "custom_id": "\udfff"}, "lone surrogate"),
        ({"prompt": ["Once", ""], "n": 3}, "prompt is empty"),
        ({"prompt": "Once", "guided_regex": "("}, "("),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "template"),
        ({"url": "/v1/embeddings", "body": {}}, "expected POST /v1/completions or"),
        ({"url": "/v1/completions", "method": "GET", "body": GOOD}, "expected POST"),
        ({"url": "/v1/completions", "body": None}, "body: "),
        ({"url": "/v1/completions", "body": GOOD, "x": 1}, "the field 'x' besides url and body"),
    ],
)
def test_a_bad_line_is_its_own_affair(worker, row, message):
    first, bad, last = run(worker, [GOOD, row, GOOD])
    assert message in bad["error"]["message"]
    assert bad["response"] is None
    assert first["error"] is last["error"] is None
    assert text(first) == text(last)
    assert worker.idle


def test_what_fails_on_the_way_fails_alone(worker, lm, monkeypatch):
    real, broken = Worker.step, []

    def step(self):
        events = real(self)
        if not broken and "line-2-0-0" in self._slots:
            broken.append(1)
            events += self._end("line-2-0-0", "error", "it broke")
        return events

    monkeypatch.setattr(Worker, "step", step)
    found = run(worker, [GOOD, GOOD | {"prompt": ["Once", "One"], "n": 2}, GOOD])
    assert [line["error"] and line["error"]["code"] for line in found] == [None, "failed", None]
    assert found[1]["error"]["message"] == "it broke"


def test_input_is_read_as_places_become_free(worker):
    seen = []

    def lines():
        for number in range(1, 200):
            seen.append(number)
            yield InputLine(number, json.dumps(GOOD | {"max_tokens": 1}).encode())

    for done, (number, _) in enumerate(run_batch(worker, lines(), BatchSettings("tiny")), 1):
        assert number == done
        assert len(seen) <= done + 8 * 4
    assert len(seen) == 199


def test_lines_are_read_one_at_a_time_whatever_their_length(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 10)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"one\n\n  \n" + b"x" * 35 + b"\nten bytes.\r\nlast")
    found = list(read_lines(path))
    assert [line.number for line in found] == [1, 4, 5, 6]
    assert [line.text for line in found] == [b"one\n", b"x" * 11, b"ten bytes.\r", b"last"]
    assert summarize_input(path).lines == 4
    assert list(read_lines(path, 4, path.read_bytes().index(b"ten"))) == found[2:]
    assert summarize_input(path) != summarize_input(__import__("pathlib").Path(__file__))

"""Documents in the Python API, in batches and on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paceline import LM
from paceline.cli.app import app
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.documents.prompt import MAX_DOCUMENTS, around_messages, document_texts
from paceline.engines.static import StaticEngine
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.serving.messages import Job
from paceline.serving.worker import Worker
from tests.conftest import shared

DOCUMENTS = (
    "Tom had a big red ball. He liked to play with the ball in the park every day.",
    {"title": "Lily", "text": "She was a little girl with a black cat."},
    "Once upon a time, there was a dog who wanted to fly. The dog was sad.",
)
PROMPTS = ("Lily and Tom went", "The dog and the cat", "Max")


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="recycle", budget=8)


def alone(lm, request) -> list[int]:
    drafter = lm.drafter_method.build(lm.draft_target)
    return Generation(lm.engine, drafter, request, Fixed(0)).run().tokens


def run(worker, jobs) -> dict[str, list[int]]:
    for job in jobs:
        worker.submit(job)
    outputs = {}
    while not worker.idle:
        for event in worker.step():
            assert not event.error, event.error
            if event.output is not None:
                outputs[event.id] = event.output.tokens
    return outputs


@pytest.mark.parametrize("pages", [None, 7])
def test_companions_in_a_batch_change_nothing(lm, pages) -> None:
    """Documents, none, samplers, prefixes and preemption beside each other: as alone."""
    requests = {
        f"{index} {count} {recompute}": lm.request(
            prompt,
            max_new_tokens=60,
            temperature=0.8 * (index == 1),
            seed=index,
            documents=DOCUMENTS[:count],
            recompute=recompute,
        )
        for index, prompt in enumerate(PROMPTS)
        for count, recompute in ((0, 0), (1, 0), (3, 0), (3, 0.2))
    }
    expected = {name: alone(lm, request) for name, request in requests.items()}
    assert expected["0 0 0"] != expected["0 3 0"] != expected["0 1 0"]
    memory = None if pages is None else pages * lm.engine.memory.page_bytes
    worker = Worker(lm, memory=memory)
    try:
        for _ in range(2):
            lm.store_chunks(None)
            jobs = [Job(name, request, budget=6) for name, request in requests.items()]
            assert run(worker, jobs) == expected
        assert pages is None or worker.stats.preempted
    finally:
        worker.close()
        lm.engine.kv_limit = lm.engine.shared = None
    assert lm.engine.memory.used == 0


def test_a_second_request_computes_no_document(lm) -> None:
    lm.store_chunks(None)
    worker = Worker(lm)
    try:
        for prompt, cached in ((PROMPTS[0], 0), (PROMPTS[1], 1)):
            request = lm.request(prompt, max_new_tokens=4, documents=DOCUMENTS)
            before = worker.stats.prompt_tokens
            worker.submit(Job(prompt, request))
            events = [event for _ in range(200) if not worker.idle for event in worker.step()]
            sizes = sum(request.documents.sizes)
            assert events[-1].cached == cached * sizes
            ran = worker.stats.prompt_tokens - before
            assert (ran < len(request.prompt) - sizes) == bool(cached)
    finally:
        worker.close()


def test_lists_of_prompts_are_each_that_of_its_own(lm) -> None:
    options = {"documents": DOCUMENTS, "recompute": 0.1, "max_new_tokens": 20}
    outputs = lm.generate(list(PROMPTS), **options)
    assert [each.text for each in outputs] == [lm.generate(p, **options).text for p in PROMPTS]


def test_documents_stand_behind_what_begins_a_text() -> None:
    lm = LM(shared("models", "stories260K"), drafter="plain")
    request = lm.request("Lily", documents=DOCUMENTS[:1])
    begin, size = request.documents.start, request.documents.sizes[0]
    document = lm.tokenizer.encode(f"{DOCUMENTS[0]}\n\n", False)
    assert list(request.prompt[begin : begin + size]) == document
    assert list(request.prompt[:begin]) == lm.encode("Lily")[:begin] == [1]
    assert list(request.prompt[begin + size :]) == lm.tokenizer.encode("Lily", False)
    ids = lm.request([1, 50, 51], documents=DOCUMENTS[:1])
    assert (ids.documents.start, ids.prompt[-2:]) == (1, (50, 51))
    bare = lm.request([50, 51], documents=DOCUMENTS[:1])
    assert (bare.prompt[0], bare.prompt[-2:]) == (1, (50, 51))


def test_in_a_conversation_they_stand_before_the_last_users_message() -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Who?"},
    ]

    def encode(marked, mark):
        text = "".join(f"{each['role']}: {each['content']}\n" for each in marked)
        return [list(map(ord, part)) for part in text.split(mark)]

    before, after = ("".join(map(chr, part)) for part in around_messages(messages, encode))
    assert before == "user: Hi\nassistant: Yes?\nuser: "
    assert after == "Who?\n"
    with pytest.raises(RequestError, match="there is none"):
        around_messages(messages[1:2], encode)
    with pytest.raises(RequestError, match="0 times"):
        around_messages(messages, lambda marked, mark: [[1]])
    with pytest.raises(RequestError, match="expected text"):
        around_messages([{"role": "user", "content": [{"type": "text"}]}], encode)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("text", "expected a list"),
        (3, "expected a list"),
        ([3], "document 1"),
        (["a", ""], "document 2 is empty"),
        ([{"text": "a", "url": "b"}], "a field 'url'"),
        ([{"title": "a"}], "document 1"),
        ([{"title": 3, "text": "a"}], "title of document 1"),
        (["a"] * (MAX_DOCUMENTS + 1), f"{MAX_DOCUMENTS} or fewer"),
    ],
)
def test_wrong_documents_are_refused_in_one_sentence(wrong, words) -> None:
    with pytest.raises(RequestError, match=words):
        document_texts("documents", wrong)


def test_what_does_not_go_together_is_refused(lm) -> None:
    with pytest.raises(RequestError, match="recompute is 2, expected 0 to 1"):
        lm.request("a", documents=["b"], recompute=2)
    with pytest.raises(RequestError, match="there are none"):
        lm.request("a", recompute=0.5)
    with pytest.raises(RequestError, match="prompt behind the documents is empty"):
        lm.request("", documents=["b"])
    model = load(shared("models", "stories260K"))
    with pytest.raises(MethodError, match="documents and the engine static do not go together"):
        lm.request("a", documents=["b"]).documents.check(StaticEngine(model.config, model.weights))


def test_the_command_line(tmp_path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, text in zip(paths, (DOCUMENTS[0], DOCUMENTS[2]), strict=True):
        path.write_text(text)
    command = ["generate", PROMPTS[0], "--json", "--max-new-tokens", "20", "--drafter", "plain"]
    command += [word for path in paths for word in ("--document", str(path))]
    command += ["--recompute", "0.2", "--chunk-cache", str(tmp_path / "chunks")]
    found = [json.loads(CliRunner().invoke(app, command).stdout) for _ in range(2)]
    assert found[0]["text"] == found[1]["text"]
    assert [each["cached_tokens"] for each in found] == [0, sum(found[0]["documents"])]
    assert found[0]["lossy"]
    refused = CliRunner().invoke(app, ["generate", "a", "--document", str(tmp_path / "none")])
    assert refused.exit_code == 2
    assert "cannot read the document" in refused.output

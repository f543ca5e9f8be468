"""Prompts that are read apart: every token is that of a server that reads them itself."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.grammar import Grammar
from paceline.engines.native import KV_FORMATS
from paceline.engines.pages import PAGE
from paceline.engines.pipeline.wire import WireError
from paceline.kvcache.sliding_window import SlidingWindow
from paceline.serving.messages import Job
from tests.conftest import shared
from tests.serving.prefill_nodes import ThreadNodes, prefilling
from tests.serving.test_worker import alone, drive, tokens_of


def opened(**options):
    return LM(shared("models", "stories260K"), threads=1, **options)


@pytest.fixture(scope="module")
def lm():
    return opened(drafter="blend")


def prompt(length, seed=0, beginning=()):
    """Token ids that nobody has seen."""
    ids = np.random.default_rng(seed).integers(3, 500, length - len(beginning))
    return [*beginning, *ids.tolist()]


def request(lm, length=300, seed=0, beginning=(), **options):
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": seed, **options}
    ends = {} if "grammar" in options else {"ignore_eos": True}
    return lm.request(prompt(length, seed, beginning), **ends, **options)


def finished(events):
    return {event.id: event.finish for event in events if event.finish}


def await_replica(worker):
    """Wait until a replica is free, as one that was lost is started again."""
    for _ in range(600):
        worker.prefill.drop_lost()
        if worker.prefill.free():
            return
        worker.prefill.arrived.clear()
        worker.prefill.arrived.wait(0.1)
    raise AssertionError("no replica is ever free")


def settle(worker):
    """Let the worker note how much replicas have run."""
    await_replica(worker)
    worker.step()


def run(worker, **requests):
    """Answers of requests that are submitted together."""
    for name, each in requests.items():
        worker.submit(Job(name, each))
    events = drive(worker, steps=50_000)
    assert set(finished(events)) == set(requests)
    assert set(finished(events).values()) == {"length"}, events[-1]
    return {name: tokens_of(events, name) for name in requests}


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("drafter", ["plain", "blend", "sparse_kv"])
def test_tokens_are_those_of_one_process_in_every_cache_format(kv_format, drafter):
    if drafter == "sparse_kv" and kv_format in ("int4", "int3"):
        drafter = "layer_skip"  # which goes with grouped positions
    lm = opened(kv_format=kv_format, drafter=drafter)
    asked = {f"r{n}": request(lm, length, n) for n, length in enumerate((300, 65, 129, 128, 40))}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with prefilling(lm) as worker:
        for name, each in asked.items():
            await_replica(worker)
            assert run(worker, **{name: each})[name] == expected[name]
        settle(worker)
        counts = worker.prefill.statistics
        assert (counts.prompts, counts.pages) == (4, 4 + 1 + 2 + 1)
        assert (counts.tokens, counts.again) == (8 * PAGE, 0)
        assert worker.prefill.received_bytes == 8 * lm.engine.memory.page_bytes
        assert worker.stats.prompt_tokens == sum((299, 64, 128, 127, 39)) - 8 * PAGE


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_mixed_requests_get_what_they_would_have_got_alone(lm, data):
    pages = data.draw(st.sampled_from([None, None, 12, 16]))
    count = data.draw(st.integers(1, 2))
    with prefilling(lm, count, pages=pages, max_running=data.draw(st.integers(1, 4))) as worker:
        expected, events = {}, []
        for number in range(data.draw(st.integers(1, 6))):
            length = data.draw(st.integers(2, 330))
            common = prompt(data.draw(st.sampled_from([0, 1, 100, 200])), 99)[: length - 1]
            shaped = {"grammar": Grammar("[a-z ]{5,9}")} if data.draw(st.booleans()) else {}
            each = request(lm, length, number, common, **shaped)
            expected[str(number)] = alone(lm, each)
            worker.submit(Job(str(number), each, budget=data.draw(st.sampled_from([None, 0, 3]))))
            for _ in range(data.draw(st.integers(0, 3))):
                events += worker.step()
        drive(worker, events, steps=50_000)
        assert {name: tokens_of(events, name) for name in expected} == expected
        assert not worker.scheduler.jobs


def test_a_prefix_that_this_process_holds_is_not_read_again(lm):
    common = prompt(200, 7)
    first, second = (request(lm, 330, seed, common) for seed in (1, 2))
    third = request(lm, 330, 3, prompt(330, 2, common)[:250])
    expected = [alone(lm, each) for each in (first, second, third)]
    with prefilling(lm, threshold=100) as worker:
        here, worker._apart = worker._apart, None  # this one is read here
        assert run(worker, a=first)["a"] == expected[0]
        worker._apart = here
        counts, size = worker.prefill.statistics, lm.engine.memory.page_bytes
        assert run(worker, b=second)["b"] == expected[1]
        settle(worker)
        assert (counts.tokens, counts.pages) == (2 * PAGE, 2)  # 329 tokens are 5 pages, of which 3
        assert worker.prefill.sent_bytes == 3 * size
        assert worker.stats.cached_tokens == 200
        worker.prefix_cache.clear()
        assert run(worker, c=third)["c"] == expected[2]
        settle(worker)
        assert (counts.tokens, counts.pages) == (4 * PAGE, 7)  # the replica held 3 pages of it
        assert worker.prefill.sent_bytes == 3 * size


def test_what_depends_on_more_than_tokens_is_read_here(lm):
    plain = request(lm)
    bounded = replace(plain, kv_policy=SlidingWindow())
    documents = lm.request(
        "What now?", documents=["Once upon a time " * 30], max_new_tokens=8, ignore_eos=True
    )
    expected = {"a": alone(lm, bounded), "b": alone(lm, documents)}
    with prefilling(lm) as worker:
        assert run(worker, a=bounded, b=documents) == expected
        assert not worker.prefill.statistics.prompts


def test_short_prompts_are_read_here(lm):
    asked = {"a": request(lm, 250, 1), "b": request(lm, 256, 2), "c": request(lm, 257, 3)}
    with prefilling(lm, threshold=256) as worker:
        run(worker, **asked)
        assert worker.prefill.statistics.prompts == 1


def test_streams_go_on_while_a_prompt_is_read(lm):
    stream = request(lm, 20, 1, max_new_tokens=400, temperature=0.0)
    late = request(lm, 300, 2)
    with prefilling(lm) as worker:
        worker.submit(Job("stream", stream, budget=0))
        worker.step()
        worker.submit(Job("late", late))
        events, nodes = [], worker.stats.nodes
        while not tokens_of(events, "late"):
            events += worker.step()
        # Every pass had one token of the stream, and the last ones the rest of the prompt.
        apart = len(tokens_of(events, "stream"))
        assert worker.stats.nodes - nodes - apart <= 299 - 4 * PAGE + 2 * 64
        drive(worker, events)
        assert tokens_of(events, "late") == alone(lm, late)


def test_a_prompt_waits_for_a_busy_replica_only_while_others_decode(lm):
    asked = {str(n): request(lm, 300, n, max_new_tokens=4) for n in range(6)}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with prefilling(lm, max_running=6) as worker:
        assert run(worker, **asked) == expected
        assert 1 <= worker.prefill.statistics.prompts <= 6


def test_a_prompt_does_not_wait_for_one_that_takes_much_longer(lm):
    """While others decode: a replica that answers nothing holds a long text, and a short one."""
    nodes = ThreadNodes(lm, broken=lambda number, link: Cut(link, 0, silent=True))
    stream = request(lm, 20, 1, max_new_tokens=400)
    short, other = request(lm, 100, 2), request(lm, 400, 3)
    with prefilling(lm, nodes=nodes) as worker:
        worker.submit(Job("stream", stream, budget=0))
        worker.step()
        for name, each in {"long": request(lm, 400, 4), "short": short, "other": other}.items():
            worker.submit(Job(name, each))
        events = []
        while "short" not in finished(events):
            events += worker.step()
        assert tokens_of(events, "short") == alone(lm, short)
        assert worker.scheduler.jobs["other"].held == 0  # it waits for the replica
        while "stream" not in finished(events):
            events += worker.step()
        for _ in range(3):  # nobody decodes any more
            worker.step()
        assert worker.scheduler.jobs["other"].held > 0


class Cut:
    """A link that ends after some frames with pages, or carries nothing."""

    def __init__(self, link, pages, silent=False):
        self.link, self.left, self.silent = link, pages, silent

    def send(self, head, arrays=()):
        if self.silent:
            return
        if head["kind"] == "page":
            if not self.left:
                self.link.close()
                raise WireError("cut")
            self.left -= 1
        self.link.send(head, arrays)

    def __getattr__(self, name):
        return getattr(self.link, name)


@pytest.mark.parametrize("pages", [0, 2, 3])
def test_a_replica_that_ends_in_the_middle_loses_nothing(lm, pages):
    nodes = ThreadNodes(lm, broken=lambda number, link: Cut(link, pages) if not number else link)
    asked = {"a": request(lm, 300, 1), "b": request(lm, 280, 2)}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with prefilling(lm, nodes=nodes) as worker:
        assert run(worker, **asked) == expected
        counts = worker.prefill.statistics
        assert (counts.lost, counts.again) == (1, 1)
        await_replica(worker)
        late = request(lm, 310, 3)
        assert run(worker, c=late)["c"] == alone(lm, late)
        assert counts.lost == 1
        assert counts.prompts >= 1


def test_replicas_that_always_end_leave_prompts_to_this_process(lm):
    nodes = ThreadNodes(lm, broken=lambda number, link: Cut(link, 1))
    asked = {str(n): request(lm, 300, n) for n in range(3)}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with prefilling(lm, 2, nodes=nodes) as worker:
        assert run(worker, **asked) == expected
        assert worker.prefill.statistics.prompts == 0
        assert worker.prefill.statistics.lost >= 2


class Changed:
    """A link whose frames are changed on their way to the decoding process."""

    def __init__(self, link, change):
        self.link, self.change = link, change

    def send(self, head, arrays=()):
        for each in self.change(dict(head), list(arrays)):
            if isinstance(each, bytes):
                with suppress(OSError):  # the other side has ended the connection
                    self.link._socket.sendall(each)
            else:
                self.link.send(*each)

    def __getattr__(self, name):
        return getattr(self.link, name)


def of_pages(change):
    """Change frames that hold a page."""
    return lambda head, arrays: change(head, arrays) if head["kind"] == "page" else [(head, arrays)]


HOSTILE = {
    "short page": of_pages(lambda head, arrays: [(head, [arrays[0][:-1]])]),
    "long page": of_pages(lambda head, arrays: [(head, [np.append(arrays[0], arrays[0][:1])])]),
    "no page": of_pages(lambda head, arrays: [(head, [])]),
    "floats": of_pages(lambda head, arrays: [(head, [arrays[0].view(np.float32)])]),
    "page of another prompt": of_pages(lambda head, arrays: [(head | {"job": 99}, arrays)]),
    "page twice": of_pages(lambda head, arrays: [(head, arrays)] * 2),
    "page left out": of_pages(lambda head, arrays: [] if head["page"] == 1 else [(head, arrays)]),
    "page that is no number": of_pages(lambda head, arrays: [(head | {"page": "1"}, arrays)]),
    "end too early": of_pages(
        lambda head, arrays: [({"kind": "done", "job": head["job"], "computed": 1}, [])]
    ),
    "something else": of_pages(lambda head, arrays: [b"GET / HTTP/1.1\r\n\r\n" + bytes(64)]),
    "too long a frame": of_pages(lambda head, arrays: [b"PLP1\xff\xff\xff\x00" + b"\xff" * 8]),
    "unknown kind": of_pages(lambda head, arrays: [({"kind": "eval", "job": head["job"]}, [])]),
    "negative positions": lambda head, arrays: [(head | {"positions": -64}, arrays)],
    "odd positions": lambda head, arrays: [(head | {"positions": 63}, arrays)],
    "positions of text": lambda head, arrays: [(head | {"positions": "0"}, arrays)],
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_replica_that_speaks_otherwise_is_given_up_without_a_wrong_token(lm, fault):
    def broken(number, link):
        return Changed(link, HOSTILE[fault]) if not number else link

    asked = request(lm, 300, 5)
    with prefilling(lm, nodes=ThreadNodes(lm, broken=broken)) as worker:
        assert run(worker, a=asked)["a"] == alone(lm, asked)
        assert worker.prefill.statistics.lost == 1


def test_a_replica_that_cannot_hold_a_prompt_leaves_it_to_this_process(lm):
    small = lm.engine.memory.page_bytes * 3

    class Small(ThreadNodes):
        def connect(self, indices):
            links = super().connect(indices)
            for reader in self.readers:
                reader.engine.kv_limit = small
            return links

    asked = request(lm, 300, 6)
    with prefilling(lm, nodes=Small(lm)) as worker:
        assert run(worker, a=asked)["a"] == alone(lm, asked)
        counts = worker.prefill.statistics
        assert (counts.prompts, counts.lost) == (0, 0)
        assert counts.again == 3


def test_a_prompt_that_is_cancelled_leaves_its_replica_free(lm):
    with prefilling(lm) as worker:
        for number in range(3):
            worker.submit(Job(f"r{number}", request(lm, 400, number)))
            worker.step()
            worker.cancel(f"r{number}")
            assert worker.idle
        asked = request(lm, 300, 9)
        assert run(worker, a=asked)["a"] == alone(lm, asked)
        assert not worker.prefill.statistics.lost


def test_requests_that_are_preempted_while_they_are_read_lose_nothing(lm):
    asked = {str(n): request(lm, 200, n, max_new_tokens=120) for n in range(4)}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with prefilling(lm, pages=11, max_running=4) as worker:
        assert run(worker, **asked) == expected
        assert worker.stats.preempted


def read(link, **head):
    tokens = head.pop("tokens", np.arange(PAGE, dtype=np.int32))
    link.send({"kind": "read", "job": 1, "start": 0, **head}, [tokens])


@pytest.mark.parametrize(
    "head",
    [
        {"start": 64},
        {"start": -64},
        {"start": 3},
        {"tokens": np.arange(70, dtype=np.int32)},
        {"tokens": np.zeros(0, np.int32)},
        {"tokens": np.zeros((2, 64), np.int32)},
        {"tokens": np.zeros(64, np.float32)},
        {"tokens": np.full(64, 10**6, np.int32)},
        {"tokens": np.full(64, -1, np.int32)},
        {"tokens": np.zeros(64 * 9, np.int32)},  # more than the context
    ],
)
def test_a_replica_refuses_what_it_cannot_read_in_a_sentence_and_goes_on(lm, head):
    nodes = ThreadNodes(lm)
    [link] = nodes.connect([0])
    read(link, **head)
    heads = []
    while not heads or heads[-1]["kind"] not in ("failed", "done"):
        heads.append(link.receive()[0])
    assert heads[-1]["kind"] == "failed"
    assert "\n" not in heads[-1]["message"]
    read(link, job=2)
    while (found := link.receive()[0])["kind"] != "done":
        assert found["job"] == 2
    link.close()


def test_pages_for_a_replica_must_come_in_order_and_have_its_size(lm):
    [link] = ThreadNodes(lm).connect([0])
    size = lm.engine.memory.page_bytes
    for number, (page, length) in enumerate([(1, size), (0, size - 1)]):
        read(link, job=number, start=64, tokens=np.arange(128, dtype=np.int32))
        assert link.receive()[0]["kind"] == "holds"
        link.send({"kind": "page", "job": number, "page": page}, [np.zeros(length, np.uint8)])
        assert link.receive()[0]["kind"] == "failed"
    link.close()


def test_a_connection_that_speaks_otherwise_ends_a_replica(lm):
    nodes = ThreadNodes(lm)
    [link] = nodes.connect([0])
    link.send({"kind": "what", "job": 0})
    with pytest.raises(WireError):
        link.receive()
    link.close()
    nodes.threads[0].join(60)
    assert not nodes.threads[0].is_alive()

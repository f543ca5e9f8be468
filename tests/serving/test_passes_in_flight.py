"""Requests over a pipeline: groups of them overlap, and each gets what it would have got alone."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from threading import Condition

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.engines.pipeline.settings import Pipeline
from paceline.serving.messages import Job
from paceline.serving.worker import Worker
from tests.engines.threaded_nodes import ThreadedNodes
from tests.serving.test_worker import PROMPTS, alone, drive, tokens_of, working

HANGS = 120.0  # seconds after which a test that would wait for ever fails


@pytest.fixture(scope="module")
def plain():
    with LM(drafter="blend", threads=1) as lm:
        yield lm


@contextmanager
def opened(nodes, passes=None):
    pipeline = Pipeline(nodes, ThreadedNodes.of, passes_in_flight=passes)
    with LM(drafter="blend", threads=1, pipeline=pipeline) as lm:
        yield lm


@pytest.fixture(scope="module")
def split():
    with opened(3) as lm:
        yield lm


class Meeting:
    """The second node answers each of some passes only when the first has begun another one.

    Attributes:
        met: keys of the sequences of two passes that were on both nodes at once.
        alone: whether a pass waited in vain.
    """

    def __init__(self, passes):
        self.left, self.met, self.alone = passes, [], False
        self._begun, self._changed = [], Condition()

    def before(self, index, keys):
        if index == 0:
            with self._changed:
                self._begun.append(keys)
                self._changed.notify_all()

    def behind(self, index, keys):
        if index != 1 or self.left <= 0 or self.alone:
            return
        self.left -= 1
        with self._changed:
            place = self._begun.index(keys) if keys in self._begun else -1
            others = lambda: [each for each in self._begun[place + 1 :] if not each & keys]  # noqa: E731
            self.alone = not self._changed.wait_for(others, HANGS)
            if not self.alone:
                self.met.append((keys, others()[0]))
                del self._begun[: place + 1]


def test_one_group_is_on_the_first_node_while_another_is_on_the_second(plain, split):
    requests = [
        plain.request(prompt, max_new_tokens=12, temperature=0.8, seed=seed, ignore_eos=True)
        for seed, prompt in enumerate(PROMPTS)
    ]
    meeting, nodes = Meeting(passes=8), split.engine._nodes
    with working(split) as worker:
        for number, request in enumerate(requests):
            worker.submit(Job(str(number), request, budget=0))
        nodes.before, nodes.behind = meeting.before, meeting.behind
        try:
            events = drive(worker)
        finally:
            nodes.before = nodes.behind = lambda index, keys: None
    assert not meeting.alone
    assert len(meeting.met) == 8
    for number, request in enumerate(requests):
        assert tokens_of(events, str(number)) == alone(plain, request)


def test_all_nodes_are_busy_and_every_request_has_its_share(plain, split):
    passes, most = Counter(), 0
    with working(split) as worker:
        for number in range(7):
            request = plain.request(PROMPTS[number % 4], max_new_tokens=20, ignore_eos=True)
            worker.submit(Job(str(number), request, budget=0))
        while not worker.idle:
            for event in worker.step():
                passes[event.id] += event.passes
            most = max(most, len(worker._flights))
            sizes = [len(batch.entries) for batch in worker._flights]
            assert max(sizes, default=0) <= 3  # of seven requests, of three passes
            entries = [entry.id for batch in worker._flights for entry in batch.entries]
            assert len(entries) == len(set(entries))
    assert most == 2  # besides the one that has just ended
    assert set(passes.values()) == {20}


@pytest.mark.parametrize("nodes", [2, 3])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_everybody_gets_what_they_would_have_got_alone(nodes, data, plain, pipelines):
    lm = pipelines(nodes, data.draw(st.sampled_from([None, 1, 4])))
    pages = data.draw(st.sampled_from([None, 4, 7]))
    expected, gone, events = {}, set(), []
    with working(lm, pages, max_running=data.draw(st.integers(1, 6))) as worker:
        for number in range(data.draw(st.integers(1, 7))):
            request = plain.request(
                data.draw(st.sampled_from(PROMPTS)) * data.draw(st.sampled_from([1, 1, 8])),
                max_new_tokens=data.draw(st.integers(1, 30)),
                temperature=data.draw(st.sampled_from([0.0, 0.8])),
                seed=number,
            )
            name = f"r{number}"
            expected[name] = alone(plain, request)
            budget, drafter = data.draw(st.sampled_from([(None, None), (0, None), (3, "hostile")]))
            worker.submit(Job(name, request, budget=budget, drafter=drafter))
            for _ in range(data.draw(st.integers(0, 3))):
                events += worker.step()
            if data.draw(st.integers(0, 3)) == 0:
                data.draw(st.sampled_from(lm.engine._stages)).lose()
            if data.draw(st.integers(0, 5)) == 0:
                events += worker.cancel(name)
                gone.add(name)
        drive(worker, events)
        assert not worker.scheduler.jobs
    for name, tokens in expected.items():
        found = tokens_of(events, name)
        assert found == (tokens[: len(found)] if name in gone else tokens)
    assert not lm.engine._flights


@pytest.fixture(scope="module")
def pipelines():
    known = {}

    def get(nodes, passes):
        if (nodes, passes) not in known:
            context = opened(nodes, passes)
            known[nodes, passes] = context, context.__enter__()
        return known[nodes, passes][1]

    yield get
    for context, _ in known.values():
        context.__exit__(None, None, None)


def test_preempted_requests_lose_nothing(plain, split):
    requests = [
        plain.request(prompt, max_new_tokens=150, temperature=0.9, seed=3, ignore_eos=True)
        for prompt in PROMPTS
    ]
    with working(split, pages=7, max_running=4) as worker:
        for number, request in enumerate(requests):
            worker.submit(Job(str(number), request))
        events = drive(worker)
        assert worker.stats.preempted
    for number, request in enumerate(requests):
        assert tokens_of(events, str(number)) == alone(plain, request)


def test_who_leaves_in_the_middle_of_a_pass_disturbs_nobody(plain, split):
    requests = [
        plain.request(prompt, max_new_tokens=60, ignore_eos=True, seed=3) for prompt in PROMPTS
    ]
    with working(split) as worker:
        for number, request in enumerate(requests):
            worker.submit(Job(str(number), request, budget=3))
        events = [event for _ in range(6) for event in worker.step()]
        flying = [entry.id for batch in worker._flights for entry in batch.entries]
        events += worker.cancel(flying[0])
        worker.submit(Job(flying[0], requests[0]))  # under the same name, at once
        before = len(events)
        drive(worker, events)
    for number, request in enumerate(requests):
        if str(number) != flying[0]:
            assert tokens_of(events, str(number)) == alone(plain, request)
    assert tokens_of(events[before:], flying[0]) == alone(plain, requests[0])


def test_a_bug_in_one_pass_leaves_the_worker_and_the_nodes_usable(plain, split, monkeypatch):
    request = plain.request(PROMPTS[0], max_new_tokens=9, ignore_eos=True)
    with working(split) as worker:
        for number in range(4):
            worker.submit(Job(str(number), request, budget=0))
        for _ in range(4):
            worker.step()
        assert worker._flights
        with monkeypatch.context() as patch:
            patch.setattr(worker._runner, "finish", lambda started: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                worker.step()
        worker.close("error", "a bug")
        worker.submit(Job("again", request))
        assert tokens_of(drive(worker), "again") == alone(plain, request)
        assert not split.engine._flights


def test_engines_that_run_one_pass_at_a_time_are_left_as_they_were(plain):
    worker = Worker(plain)
    worker.submit(Job("a", plain.request(PROMPTS[0], max_new_tokens=5)))
    worker.step()
    assert not worker._flights
    worker.close()

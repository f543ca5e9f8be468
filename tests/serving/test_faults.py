"""What goes wrong with one request stays with it, and memory that is short ends nobody."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest

from paceline import LM
from paceline.core import TokenTree
from paceline.drafters.base import DraftMethod, ModelBacked, single_origin_tree
from paceline.engines.pages import PAGE
from paceline.errors import MethodError, RequestError
from paceline.registry import drafters
from paceline.serving.messages import Job
from tests.serving.test_worker import PROMPTS, alone, drive, tokens_of, working


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="predicted_output")


@dataclass(frozen=True)
class Faulty(DraftMethod):
    where: str = "propose"

    def build(self, target):
        if self.where == "build":
            raise OSError("no such file")
        return _Faulty(self.where, target)


class _Faulty(ModelBacked):
    origins = ("faulty",)
    top_k = 1

    def __init__(self, where, target):
        self.where, self.target, self.outside = where, target, target.vocab_size + 7
        self.learns_from_prompt = where == "prompt"

    def begin(self, request):
        self.fail("begin")

    @property
    def engines(self):
        return [self.target.engine] if self.where == "follow" else []

    def follow(self, context, max_tokens=None):
        self.fail("follow")

    def propose(self, context, budget, min_path_prob=0.0):
        self.fail("propose")
        root = int(context[-1])
        if self.where == "tree":
            return TokenTree.chain([root, self.outside])
        if self.where == "kind":
            tree = single_origin_tree(np.array([root]), np.array([-1]), np.ones(1, np.float32))
            return replace(tree, tokens=tree.tokens.astype(np.float32))
        return TokenTree.chain([root, 5, 6])

    def observe(self, step):
        self.fail("prompt" if self.learns_from_prompt else "observe")

    def fail(self, where):
        if where == self.where:
            raise ZeroDivisionError(where)


class FaultyControl:
    def apply(self, logits, history):
        raise KeyError("no such thing")


GUIDED = ("begin", "lag", "follow", "run_tree")


class FaultyGuide:
    def __init__(self, where):
        self.where = where

    def apply(self, logits, history):
        return logits

    def begin(self, sequence):
        self.fail("begin")

    def lag(self, context):
        self.fail("lag")
        return 0

    def follow(self, context, max_tokens=None):
        self.fail("follow")
        return 0

    def positions(self, length):
        return []

    def run_tree(self, context, tree):
        self.fail("run_tree")

    def release(self):
        self.fail("release")

    def fail(self, where):
        if where == self.where:
            raise IndexError(where)


@pytest.fixture
def faulty(monkeypatch):
    method = Faulty
    monkeypatch.setitem(drafters.methods(), "faulty", method)
    parse = drafters.parse
    monkeypatch.setattr(
        drafters, "parse", lambda text: Faulty(text[7:]) if text[:7] == "faulty:" else parse(text)
    )


def both(lm, bad, caplog, **options):
    """A faulty request in the middle of good ones; returns its last event."""
    good = [lm.request(p, max_new_tokens=25, temperature=0.7, seed=3) for p in PROMPTS[:3]]
    expected = [alone(lm, request) for request in good]
    with caplog.at_level(logging.CRITICAL, "paceline"), working(lm) as worker:
        worker.submit(Job("0", good[0], budget=4))
        worker.submit(Job("bad", bad, **options))
        worker.submit(Job("1", good[1], budget=4))
        events = drive(worker)
        worker.submit(Job("2", good[2], budget=4))
        drive(worker, events)
        assert [tokens_of(events, str(n)) for n in range(3)] == expected
        assert not worker.scheduler.jobs
        [last] = [event for event in events if event.id == "bad" and event.finish]
    return last


@pytest.mark.parametrize(
    "where", ["begin", "follow", "prompt", "propose", "observe", "tree", "kind"]
)
def test_a_faulty_drafter_fails_its_own_request(lm, faulty, caplog, where):
    request = lm.request(PROMPTS[3], max_new_tokens=20)
    last = both(lm, request, caplog, drafter=f"faulty:{where}", budget=3)
    assert last.finish == "error"
    assert ("outside the vocabulary" in last.error) == (where == "tree")


@pytest.mark.parametrize("control", [FaultyControl(), *map(FaultyGuide, GUIDED)])
def test_a_faulty_control_fails_its_own_request(lm, caplog, control):
    request = replace(lm.request(PROMPTS[3], max_new_tokens=20), controls=(control,))
    last = both(lm, request, caplog, budget=3)
    assert (last.finish, "its log says more" in last.error) == ("error", True)


def test_an_end_that_fails_leaks_nothing(lm, caplog):
    guide = FaultyGuide("release")
    request = replace(lm.request(PROMPTS[3], max_new_tokens=20), controls=(guide,))
    assert both(lm, request, caplog, budget=3).finish in ("length", "stop")


def test_a_prediction_that_no_model_knows_fails_its_own_request(lm, caplog):
    request = lm.request(PROMPTS[3], max_new_tokens=20, ignore_eos=True)
    tokens = alone(lm, request)
    request = replace(request, prediction=(*tokens[:5], 1 << 20, *tokens[6:]))
    last = both(lm, request, caplog, budget=12)
    assert (last.finish, "tokens outside" in last.error) == ("error", True)


def test_text_behind_a_stop_is_not_kept_as_another(lm):
    """A pass may accept tokens behind the one that ends the output: the cache knows their names."""
    request = lm.request(PROMPTS[0], max_new_tokens=30, temperature=0.0, ignore_eos=True)
    tokens, prompt = alone(lm, request), request.prompt
    stop = next(n for n in range(8, 30) if tokens[n] not in tokens[:n])
    stopped = replace(request, prediction=tuple(tokens), stop_tokens=frozenset([tokens[stop]]))
    with working(lm) as worker:
        worker.submit(Job("stops", stopped, budget=25))
        end = tokens_of(drive(worker), "stops")
        held = len(prompt) + len(end)
        names = np.array([*prompt, *end, 0, 0, 0, 0], np.int32)
        sequence, length = worker.prefix_cache.match(names)
        lm.engine.release(sequence)
        assert length <= held
        again = replace(request, prompt=(*names.tolist(), 7))
        worker.submit(Job("again", again))
        assert tokens_of(drive(worker), "again") == alone(lm, again)


def test_guides_find_room_among_texts_of_the_past_and_other_requests(lm):
    guide = "cfg:negative=" + "A sad dog and a cat " * 12
    with working(lm, pages=7, max_running=3) as worker:
        for number in range(3):  # texts of the past
            request = lm.request([number + 3] * 60, max_new_tokens=10, ignore_eos=True)
            worker.submit(Job(f"past{number}", request))
        drive(worker)
        requests = [
            lm.request(p, max_new_tokens=70, seed=2, temperature=0.8, guide=guide, ignore_eos=True)
            for p in PROMPTS[:3]
        ]
        expected = [alone(lm, request) for request in requests]
        for number, request in enumerate(requests):
            worker.submit(Job(str(number), request, budget=3))
        events = drive(worker)
        assert not [event.error for event in events if event.error]
        assert [tokens_of(events, str(n)) for n in range(3)] == expected


def test_views_find_room_or_do_without(lm):
    with working(lm, pages=5, max_running=3) as worker:
        requests = [
            lm.request(p, max_new_tokens=90, seed=2, temperature=0.8, ignore_eos=True)
            for p in PROMPTS[:3]
        ]
        for number, request in enumerate(requests):
            worker.submit(Job(str(number), request, drafter="layer_skip:skip=1", budget=6))
        events = drive(worker)
        assert [tokens_of(events, str(n)) for n in range(3)] == [alone(lm, r) for r in requests]


def test_answers_that_begin_alike_can_be_cancelled_be_late_and_are_told(lm):
    request = lm.request([5] * 400, max_new_tokens=9, ignore_eos=True)
    with working(lm) as worker:
        worker.submit(Job("0", request))
        worker.submit(Job("1", request, after="0"))
        worker.submit(Job("2", request, after="0", deadline=0.0))
        worker.submit(Job("3", request, after="0"))
        events = worker.cancel("1") + drive(worker)
        finish = {event.id: event.finish for event in events if event.finish}
        assert finish == {"0": "length", "1": "cancelled", "2": "deadline", "3": "length"}
        assert tokens_of(events, "3") == alone(lm, request)


def test_answers_to_a_known_prompt_do_not_wait_for_the_first_to_end(lm):
    request = lm.request([5] * 150, max_new_tokens=40, ignore_eos=True)
    with working(lm) as worker:
        worker.submit(Job("before", request))
        drive(worker)
        worker.submit(Job("0", request, budget=0))
        worker.submit(Job("1", request, budget=0, after="0"))
        ids = [event.id for event in drive(worker) if event.tokens]
        assert ids.index("1") < 5


def test_answers_count_in_the_queue(lm):
    request = lm.request(PROMPTS[0], max_new_tokens=3)
    with working(lm, queue=4) as worker:
        for number in range(4):
            worker.submit(Job(str(number), request, after="0" if number else None))
        with pytest.raises(RequestError, match="4 requests wait"):
            worker.submit(Job("4", request, after="0"))
        with pytest.raises(RequestError, match="'0' is running"):
            worker.submit(Job("0", request))
        assert len([event for event in drive(worker) if event.finish]) == 4


def test_the_rejection_walk_is_refused_or_done_never_forgotten(lm):
    request = lm.request(PROMPTS[0], max_new_tokens=9, temperature=0.8, walk="rejection")
    with (
        working(lm) as worker,
        pytest.raises(
            MethodError,
            match="the rejection walk and the drafter predicted_output do not go together",
        ),
    ):
        worker.submit(Job("a", request, budget=3))


def test_ten_thousand_would_leave_no_more_than_a_few(lm):
    with working(lm, max_running=3, pages=12) as worker:
        request = lm.request(PROMPTS[0], max_new_tokens=3, ignore_eos=True)
        for number in range(300):
            name = f"lookup:longest={2 + number % 20}" if number % 3 else None
            prompt = (number % 50 + 3, number % 7 + 3, *request.prompt)
            job = replace(request, prompt=prompt, seed=number)
            worker.submit(Job(str(number), job, client=str(number), drafter=name, budget=2))
            if number % 5 == 4:
                drive(worker)
        assert not worker._slots
        assert len(worker._pools._others) <= 8
        assert all(
            len(pool.idle) <= 4 for pool in [worker._pools.own, *worker._pools._others.values()]
        )
        assert worker.prefix_cache.pages <= worker.prefix_cache.limit
        assert lm.engine.memory.used == worker.prefix_cache.pages


def test_waiting_requests_have_no_drafter_yet(lm):
    with working(lm, max_running=2) as worker:
        request = lm.request(PROMPTS[0], max_new_tokens=3)
        for number in range(20):
            worker.submit(Job(str(number), replace(request, seed=number), drafter="recycle"))
        drive(worker)
        [pool] = worker._pools._others.values()
        assert len(pool.idle) == 2


def test_shared_pages_are_not_counted_as_free(lm):
    with working(lm, pages=12, max_running=3, prefix_cache=1.0) as worker:
        prompt = [5] * (5 * PAGE)
        worker.submit(Job("a", lm.request(prompt, max_new_tokens=90, ignore_eos=True), budget=0))
        while not worker.prefix_cache.pages:
            worker.step()
        assert worker._free() == PAGE * (12 - 1 - lm.engine.memory.used)  # its last page is shared
        other = [6] * (5 * PAGE)
        worker.submit(Job("b", lm.request(other, max_new_tokens=9, ignore_eos=True), budget=0))
        drive(worker)
        assert not worker.stats.preempted


def test_those_that_fit_together_are_not_preempted(lm):
    """Two texts of two pages each, and a page for each to come."""
    with working(lm, pages=7, max_running=2, prefix_cache=0.0) as worker:
        for number, prompt in enumerate(PROMPTS[:2]):
            request = lm.request(prompt, max_new_tokens=110, ignore_eos=True)
            worker.submit(Job(str(number), request, budget=0))
        drive(worker)
        assert not worker.stats.preempted

"""Searches beside requests: each gives what it gives alone, and nobody waits long for one."""

import logging
import threading
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.decoding.strategies.base import Strategy, Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.decoding.strategies.diverse import DiverseBeam
from paceline.errors import RequestError
from paceline.serving import search_queue
from paceline.serving.messages import Job
from paceline.serving.scheduler import BusyError
from tests.serving.test_worker import PROMPTS, alone, drive, tokens_of, working

KINDS = (Beam(3, 2), DiverseBeam(4, 3), ContrastiveSearch(3))


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="recycle")


def ask(lm, name, strategy, prompt=PROMPTS[0], tokens=8, **more):
    request = lm.request(prompt, **lm.request_builder.without_sampling({"max_new_tokens": tokens}))
    return Job(name, request, strategy=strategy, **more)


def expected(lm, search):
    limit, lm.engine.kv_limit = lm.engine.kv_limit, None
    options = {"max_new_tokens": search.request.max_new_tokens}
    found = lm.search(list(search.request.prompt), search.strategy, **options)
    lm.engine.kv_limit = limit
    return [(each.tokens, each.text, each.finish, each.score, each.passes) for each in found]


def found(events, name):
    [event] = [event for event in events if event.id == name and event.finish]
    assert event.output is event.outputs[0]
    return [
        (each.tokens, each.text, each.finish, each.score, each.passes) for each in event.outputs
    ]


def no_threads():
    return not [each for each in threading.enumerate() if each.name == "paceline-search"]


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_searches_and_requests_do_not_meet(lm, data):
    one = st.tuples(
        st.sampled_from([None, *KINDS]), st.sampled_from(PROMPTS), st.integers(1, 12), st.booleans()
    )
    asked = data.draw(st.lists(one, min_size=1, max_size=6))
    with working(lm, pages=60, max_running=3) as worker:
        asks, events, left = [], [], set()
        for place, (strategy, prompt, tokens, leaves) in enumerate(asked):
            name = str(place)
            if strategy is None:
                request = lm.request(prompt, max_new_tokens=tokens, temperature=0.8, seed=place)
                asks.append(Job(name, request))
            else:
                asks.append(ask(lm, name, strategy, prompt, tokens))
            worker.submit(asks[-1])
            for _ in range(data.draw(st.integers(0, 4))):
                events += worker.step()
            if leaves and (reported := worker.cancel(name)):
                assert [event.finish for event in reported] == ["cancelled"]
                left.add(name)
        drive(worker, events)
        for each in asks:
            if each.id in left:
                continue
            if each.strategy:
                assert found(events, each.id) == expected(lm, each)
            else:
                assert tokens_of(events, each.id) == alone(lm, each.request)
    assert no_threads()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("guide", ["cfg:negative=A sad dog,scale=3", "dola:layers=1+3"])
def test_guided_searches_give_what_they_give_alone(lm, kind, guide):
    options = lm.request_builder.without_sampling({"max_new_tokens": 8, "guide": guide})
    searches = [
        Job(name, lm.request(prompt, **options), strategy=kind)
        for name, prompt in zip("ab", PROMPTS, strict=False)
    ]
    beside = Job("c", lm.request(PROMPTS[0], max_new_tokens=12, temperature=0.8, seed=1))
    with working(lm, pages=60, max_running=3) as worker:
        events = []
        for each in (*searches, beside):
            worker.submit(each)
        drive(worker, events)
    for each in searches:
        one = lm.search(list(each.request.prompt), kind, **options)
        whole = [(o.tokens, o.text, o.finish, o.score, o.passes) for o in one]
        assert found(events, each.id) == whole
    assert tokens_of(events, "c") == alone(lm, beside.request)
    assert no_threads()


def test_between_two_passes_there_is_one_of_one_search(lm, monkeypatch):
    passes = []
    forward = lm.engine.forward
    monkeypatch.setattr(
        lm.engine,
        "forward",
        lambda batch, *more, **options: (
            passes.append(threading.current_thread().name) or forward(batch, *more, **options)
        ),
    )
    with working(lm) as worker:
        worker.searches.share = 1e9  # a step for each pass, however long it takes
        for name in "ab":
            worker.submit(ask(lm, name, Beam(3), [5] * 200, tokens=20))
        request = lm.request(PROMPTS[1], max_new_tokens=30, temperature=0.0, ignore_eos=True)
        worker.submit(Job("plain", request, budget=0))
        steps = []
        while not worker.idle:
            passes.clear()
            worker.step()
            steps.append((passes.count("paceline-search"), len(passes)))
    assert max(searched for searched, _ in steps) == 1
    assert max(both for _, both in steps) == 2
    assert sum(searched for searched, _ in steps) >= 2 * (4 + 19)  # prompts in parts of 64
    assert no_threads()


def test_searches_take_their_share_of_the_time(lm, monkeypatch):
    now, steps = 0.0, []
    monkeypatch.setattr(search_queue, "perf_counter", lambda: now)
    with working(lm) as worker:
        searches = worker.searches
        searches.share = 0.5
        searches.submit(ask(lm, "a", Beam(2), tokens=100))
        step = search_queue._QueuedSearch.step

        def slow(search):
            nonlocal now
            now += 3.0
            return step(search)

        monkeypatch.setattr(search_queue._QueuedSearch, "step", slow)
        for _ in range(20):  # passes of a second
            before = now
            assert searches.step(100, alone=False) == []
            steps.append(now > before)
            searches.worked(1.0)
        assert steps == [place % 6 == 0 for place in range(20)]
        for _ in range(3):  # nobody waits, and nothing is owed for it
            before = now
            searches.step(100, alone=True)
            assert now > before
        searches.worked(4.0)
        searches.step(100, alone=False)
        assert now == before + 6.0


def test_a_search_waits_for_its_memory_and_then_has_it(lm):
    with working(lm, pages=24, max_running=8) as worker:
        requests = [
            lm.request(p, max_new_tokens=150, temperature=0.9, seed=2, ignore_eos=True)
            for p in PROMPTS
        ]
        for place, request in enumerate(requests):
            worker.submit(Job(str(place), request, budget=3))
        for _ in range(60):
            worker.step()
        search = ask(lm, "search", Beam(3, 3), tokens=60)
        worker.submit(search)
        late = lm.request(PROMPTS[0], max_new_tokens=40, temperature=0.9, seed=9)
        worker.submit(Job("late", late))
        events = drive(worker)
        assert found(events, "search") == expected(lm, search)
        for place, request in enumerate([*requests, late]):
            name = "late" if request is late else str(place)
            assert tokens_of(events, name)[-20:] == alone(lm, request)[-20:]


def test_a_search_gives_way_to_a_request_that_needs_all_memory_and_begins_anew(lm):
    with working(lm, pages=10, max_running=2) as worker:
        worker.searches.share = 1e9  # a step for each pass, however long it takes
        searches = [ask(lm, name, Beam(1), [5] * 62, 60) for name in "ab"]
        for search in searches:
            worker.submit(search)
        for _ in range(8):
            worker.step()
        assert len(worker.searches.running) == 2
        whole = lm.request([6] * 460, max_new_tokens=43, temperature=0.0, ignore_eos=True)
        worker.submit(Job("whole", whole, budget=0))
        gave_way, events = False, []
        while not worker.idle:
            events += worker.step()
            gave_way |= bool(worker.searches.waiting)
        assert gave_way
        assert tokens_of(events, "whole") == alone(lm, whole)
        for search in searches:
            assert found(events, search.id) == expected(lm, search)


def test_the_more_urgent_and_the_earlier_begin_first(lm, monkeypatch):
    monkeypatch.setattr(search_queue, "monotonic", lambda: 1.0)
    with working(lm) as worker:
        for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 0), ("e", 1), ("f", 0)):
            worker.submit(ask(lm, name, Beam(2), tokens=2, priority=priority))
        ended = [event.id for event in drive(worker)]
    assert ended == ["c", "e", "a", "b", "d", "f"]


def test_who_waits_long_becomes_urgent(lm, monkeypatch):
    now = 0.0
    monkeypatch.setattr(search_queue, "monotonic", lambda: now)
    with working(lm) as worker:
        worker.submit(ask(lm, "old", Beam(2), tokens=2))
        now = 61.0
        worker.submit(ask(lm, "urgent", Beam(2), tokens=2, priority=1))
        worker.submit(ask(lm, "more", Beam(2), tokens=2, priority=3))
        ended = [event.id for event in drive(worker)]
    assert ended == ["more", "old", "urgent"]


def test_clients_take_turns(lm, monkeypatch):
    monkeypatch.setattr(search_queue, "monotonic", lambda: 1.0)
    with working(lm) as worker:
        for name, client in zip("abcdefgh", "xxxxxxyz", strict=True):
            worker.submit(ask(lm, name, Beam(2), tokens=2, client=client))
        ended = [event.id for event in drive(worker)]
        assert not worker.searches._begun.keys() - {"x", "y", "z"}
    assert ended == ["a", "g", "h", "b", "c", "d", "e", "f"]


def test_a_search_is_late_or_cancelled_without_a_trace(lm):
    with working(lm) as worker:
        worker.submit(ask(lm, "late", Beam(2), tokens=50, deadline=0.0))
        worker.submit(ask(lm, "gone", Beam(2), tokens=50))
        [event] = worker.step()
        assert (event.id, event.finish, event.error, event.outputs) == ("late", "deadline", "", ())
        for _ in range(5):
            assert worker.step() == []
        [event] = worker.cancel("gone")
        assert (event.finish, event.error, event.output.tokens) == ("cancelled", "", [])
        assert worker.cancel("gone") == []
        worker.submit(ask(lm, "end", Beam(2), tokens=50))
        worker.step()
        assert [event.finish for event in worker.close()] == ["cancelled"]
    assert no_threads()


@dataclass(frozen=True)
class Broken(Strategy):
    name = "broken"

    def run(self, task):
        raise ZeroDivisionError


def test_a_bug_in_a_search_ends_it_alone(lm, caplog):
    caplog.set_level(logging.ERROR)
    with working(lm) as worker:
        worker.submit(ask(lm, "bad", Broken()))
        request = lm.request(PROMPTS[1], max_new_tokens=9, temperature=0.0)
        worker.submit(Job("good", request))
        events = drive(worker)
        [bad] = [event for event in events if event.id == "bad"]
        assert (bad.finish, bad.error) == (
            "error",
            "the server failed at this request; its log says more",
        )
        assert tokens_of(events, "good") == alone(lm, request)
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_guides_texts_count_in_what_a_search_may_need(lm):
    plain = ask(lm, "plain", Beam(4), tokens=40)
    options = lm.request_builder.without_sampling({"guide": "cfg:negative=A sad dog"})
    request = lm.request(PROMPTS[0], **options)
    guided = Job("guided", replace(request, max_new_tokens=40), strategy=Beam(4))
    pages = [
        search_queue._pages(each.strategy, Task(lm.engine, each.request))
        for each in (plain, guided)
    ]
    assert pages[1] == 2 * pages[0]  # one text more, in the same engine
    with working(lm, pages=2 * pages[0] + 4, max_running=2) as worker:
        worker.submit(plain)
        with pytest.raises(RequestError, match=f"may need {pages[1]} pages"):
            worker.submit(guided)
        worker.cancel("plain")


def test_what_cannot_be_searched_is_refused_at_once(lm):
    with working(lm, pages=20, queue=1) as worker:
        with pytest.raises(RequestError, match="may need 28 pages of memory, and there are 9"):
            worker.submit(ask(lm, "large", Beam(9), tokens=40))
        hot = replace(ask(lm, "hot", Beam(2)), request=lm.request(PROMPTS[0], temperature=1.0))
        with pytest.raises(RequestError, match="the strategy draws nothing"):
            worker.submit(hot)
        worker.submit(ask(lm, "a", Beam(1)))
        with pytest.raises(BusyError, match="1 searches wait already"):
            worker.submit(ask(lm, "b", Beam(1)))
        worker.step()
        with pytest.raises(RequestError, match="'a' is running"):
            worker.submit(ask(lm, "a", Beam(1)))
        assert [event.id for event in drive(worker)] == ["a"]

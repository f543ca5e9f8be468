"""Many requests on one engine: each gets what it would have got alone."""

import contextlib
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.grammar import Grammar
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.errors import RequestError
from paceline.serving.messages import Job
from paceline.serving.worker import Worker

PROMPTS = ("Once upon a time", "The dog and the cat", "Lily wanted to", "One day, a boy named Tom")


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="blend")


@pytest.fixture
def worker(lm):
    with working(lm) as found:
        yield found


@contextlib.contextmanager
def working(lm, pages=None, **options):
    """A worker that leaves nothing behind."""
    memory = None if pages is None else pages * lm.engine.memory.page_bytes
    found = Worker(lm, memory=memory, **options)
    try:
        yield found
    finally:
        found.close()
        assert lm.engine.memory.used == 0


def alone(lm, request):
    """What plain decoding gives, with memory of its own."""
    limit, lm.engine.kv_limit = lm.engine.kv_limit, None
    drafter = lm.drafter_method.build(lm.draft_target)
    found = Generation(lm.engine, drafter, request, Fixed(0)).run().tokens
    lm.engine.kv_limit = limit
    return found


def drive(worker, events=None, steps=2000):
    """Everything that comes until nothing is left to do."""
    events = [] if events is None else events
    for _ in range(steps):
        if worker.idle:
            return events
        events += worker.step()
    raise AssertionError("it does not end")


def tokens_of(events, name):
    return [token for event in events if event.id == name for token in event.tokens]


def text_of(events, name):
    return "".join(event.text for event in events if event.id == name)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_everybody_gets_what_they_would_have_got_alone(lm, data):
    max_running = data.draw(st.integers(1, 5))
    pages = data.draw(st.sampled_from([None, 4, 7]))
    with working(lm, pages, max_running=max_running) as worker:
        mixed(lm, data, worker)


def mixed(lm, data, worker):
    expected, events = {}, []
    for number in range(data.draw(st.integers(1, 6))):
        request = lm.request(
            data.draw(st.sampled_from(PROMPTS)),
            max_new_tokens=data.draw(st.integers(1, 30)),
            temperature=data.draw(st.sampled_from([0.0, 0.8])),
            seed=number,
        )
        budget = data.draw(st.sampled_from([None, 0, 3]))
        drafter = data.draw(st.sampled_from([None, "hostile", "lookup"]))
        expected[f"r{number}"] = alone(lm, request)
        worker.submit(Job(f"r{number}", request, budget=budget, drafter=drafter))
        for _ in range(data.draw(st.integers(0, 3))):
            events += worker.step()
    drive(worker, events)
    for name, tokens in expected.items():
        assert tokens_of(events, name) == tokens
    assert not worker.scheduler.jobs


def test_preempted_requests_lose_nothing(lm):
    with working(lm, pages=7, max_running=4) as worker:
        preempted(lm, worker)


def preempted(lm, worker):
    requests = [
        lm.request(prompt, max_new_tokens=250, temperature=0.9, seed=3, ignore_eos=True)
        for prompt in PROMPTS
    ]
    for number, request in enumerate(requests):
        worker.submit(Job(str(number), request))
    events = drive(worker)
    assert worker.stats.preempted
    for number, request in enumerate(requests):
        assert tokens_of(events, str(number)) == alone(lm, request)


def test_who_leaves_disturbs_nobody(lm, worker):
    stays = lm.request(PROMPTS[0], max_new_tokens=40, ignore_eos=True)
    worker.submit(Job("stays", stays))
    worker.submit(Job("leaves", lm.request(PROMPTS[1], max_new_tokens=40, ignore_eos=True)))
    worker.submit(Job("late", lm.request(PROMPTS[2], max_new_tokens=40), deadline=0.0))
    events = [event for _ in range(4) for event in worker.step()]
    events += worker.cancel("leaves")
    assert worker.cancel("leaves") == []
    drive(worker, events)
    finish = {event.id: event.finish for event in events if event.finish}
    assert finish == {"stays": "length", "leaves": "cancelled", "late": "deadline"}
    assert tokens_of(events, "stays") == alone(lm, stays)


def test_an_error_is_its_requests_own(lm, worker):
    class Forbids:
        def apply(self, logits, history):
            return np.full_like(logits, -np.inf)

    good = lm.request(PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    bad = replace(good, controls=(Forbids(),))
    worker.submit(Job("good", good))
    worker.submit(Job("bad", bad))
    events = drive(worker)
    [failed] = [event for event in events if event.finish == "error"]
    assert failed.id == "bad"
    assert "allow no token" in failed.error
    assert tokens_of(events, "good") == alone(lm, good)
    with pytest.raises(RequestError, match="prompt is empty"):
        worker.submit(Job("empty", replace(good, prompt=())))
    assert worker.idle


def test_grammars_and_stop_strings_hold_in_a_batch(lm, worker):
    grammar = Grammar.choice(["yes", "no", "perhaps"])
    worker.submit(Job("choice", lm.request(PROMPTS[0], grammar=grammar, max_new_tokens=20)))
    worker.submit(
        Job("stopped", lm.request(PROMPTS[0], stop=["able"], max_new_tokens=60, temperature=0.0))
    )
    events = drive(worker)
    assert text_of(events, "choice") in ("yes", "no", "perhaps")
    assert "able" not in text_of(events, "stopped")
    finish = {event.id: event.finish for event in events if event.finish}
    assert finish == {"choice": "stop", "stopped": "stop"}


def test_several_answers_wait_for_one_prompt(lm, worker):
    requests = [
        lm.request(PROMPTS[0] * 8, max_new_tokens=12, temperature=1.0, seed=seed)
        for seed in range(3)
    ]
    for seed, request in enumerate(requests):
        worker.submit(Job(str(seed), request, after="0" if seed else None))
    events = drive(worker)
    for seed, request in enumerate(requests):
        assert tokens_of(events, str(seed)) == alone(lm, request)


def test_logprobs_are_the_models_own(lm, worker):
    request = lm.request(PROMPTS[0], max_new_tokens=8, temperature=0.0)
    worker.submit(Job("a", request, logprobs=3))
    events = drive(worker)
    reported = [each for event in events for each in event.logprobs]
    assert [each.token for each in reported] == tokens_of(events, "a")
    for each in reported:
        assert each.top[0] == (each.token, each.logprob)
        assert sum(np.exp(logprob) for _, logprob in each.top) <= 1.0
        assert len(each.top) == 3
    origins = [origin for event in events for origin in event.origins]
    assert len(origins) == len(reported)


def test_what_was_run_before_is_not_run_again(lm, worker):
    prompt = lm.tokenizer.encode(" ".join(PROMPTS) * 6)
    request = lm.request(prompt, max_new_tokens=20, ignore_eos=True)
    worker.submit(Job("first", request))
    first = tokens_of(drive(worker), "first")
    assert worker.stats.prompt_tokens == len(prompt) - 1
    again = lm.request([*prompt, *first, 5, 6], max_new_tokens=20, ignore_eos=True)
    worker.submit(Job("second", again))
    events = drive(worker)
    assert events[-1].cached >= len(prompt) + 18
    assert worker.stats.prompt_tokens <= len(prompt) + 3
    assert tokens_of(events, "second") == alone(lm, again)


def test_texts_of_the_past_make_room(lm):
    with working(lm, pages=6, max_running=2) as worker:
        for number in range(8):
            prompt = [number + 3] * 150
            request = lm.request(prompt, max_new_tokens=30, ignore_eos=True)
            worker.submit(Job(str(number), request))
            found = tokens_of(drive(worker), str(number))
            assert worker.prefix_cache.pages
            assert found == alone(lm, request)
        assert worker.prefix_cache.statistics.evicted


def test_too_little_memory_is_refused(lm):
    with pytest.raises(RequestError, match="1 pages of keys and values, expected 4"):
        Worker(lm, memory=lm.engine.memory.page_bytes)


def test_guides_of_concurrent_requests_do_not_meet(lm, worker):
    guides = ("cfg:negative=A sad dog,scale=2", "dola:layers=1+3", "cfg:scale=3,stop=0.1", ())
    requests = {
        f"{prompt} {guide}": lm.request(
            prompt, max_new_tokens=12, temperature=0.8, seed=seed, guide=guide
        )
        for seed, (prompt, guide) in enumerate(zip(PROMPTS, guides, strict=True))
    }
    expected = {name: alone(lm, request) for name, request in requests.items()}
    for name, request in requests.items():
        worker.submit(Job(name, request, budget=5))
    events = drive(worker)
    assert {name: tokens_of(events, name) for name in requests} == expected
    assert worker.stats.guide > 0


def test_auto_is_the_governors_whatever_the_server_does(lm):
    lm = copy(lm)
    lm.budget = Fixed(0)
    with working(lm) as worker:
        request = lm.request(PROMPTS[0], max_new_tokens=30, temperature=0.0)
        for budget in (None, "auto", 4):
            worker.submit(Job(str(budget), request, budget=budget))
        events = drive(worker)
        nodes = {event.id: event.output.nodes for event in events if event.output}
        assert nodes["None"] == 30 < nodes["4"]
        assert worker.governor.passes > 0

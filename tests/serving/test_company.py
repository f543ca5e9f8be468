"""Requests of every kind in one batch, and drafters that run models: each as it would be alone."""

import pytest

from paceline import LM
from paceline.control.grammar import Grammar
from paceline.serving.messages import Job
from tests.conftest import shared
from tests.serving.test_worker import PROMPTS, alone, drive, tokens_of, working

STORY = "Once upon a time there was a little girl named Lily. She liked to play with her dog. "


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "bitstories-3M"))


def company(lm, drafter, budget, **options):
    """Several requests with one drafter each, over and over; returns the worker's stats."""
    kinds = [(0.0, ""), (0.8, ""), (0.8, STORY), (0.0, STORY)]
    requests = [
        lm.request(
            more + PROMPTS[n], max_new_tokens=24, temperature=temperature, seed=n, ignore_eos=True
        )
        for n, (temperature, more) in enumerate(kinds)
    ]
    expected = [alone(lm, request) for request in requests]
    with working(lm, **options) as worker:
        events = []
        for turn in range(2):
            for number, request in enumerate(requests):
                job = Job(f"{turn}.{number}", request, drafter=drafter, budget=budget)
                worker.submit(job)
                events += worker.step()
            drive(worker, events)
        for turn in range(2):
            for number, tokens in enumerate(expected):
                assert tokens_of(events, f"{turn}.{number}") == tokens
        [pool] = worker._pools._others.values()
        return worker.stats, pool


@pytest.mark.parametrize("pages", [None, 13])
@pytest.mark.parametrize("settings", ["", ",head=64", ",stop=bandit"])
def test_a_draft_model_serves_all_with_one_engine(lm, pages, settings):
    path = shared("models", "stories260K")
    stats, pool = company(lm, f"model:path={path}{settings}", 6, pages=pages, max_running=3)
    assert stats.accepted.get("model", 0) > 0
    assert len(pool.idle) in (2, 3)
    engines = {follower.engine for drafter in pool.idle for follower in drafter._followers}
    assert len(engines) == 1
    first, other = pool.idle[:2]
    assert first._followers[0] is not other._followers[0]
    assert first._calibration._sharpness is other._calibration._sharpness


@pytest.mark.parametrize(
    ("drafter", "name"),
    [
        ("layer_skip:skip=1", "layer_skip"),
        ("sparse_kv:sinks=1,recent=4,retrieved=16,least=1", "sparse_kv"),
    ],
)
@pytest.mark.parametrize("pages", [None, 6])
def test_parts_of_the_model_draft_for_many(lm, drafter, name, pages):
    stats, pool = company(lm, drafter, 6, pages=pages, max_running=3)
    assert stats.accepted.get(name, 0) > 0
    assert len({id(drafter._calibration._sharpness) for drafter in pool.idle}) == 1


@pytest.mark.parametrize(("pages", "budget"), [(None, 5), (None, None), (9, 5)])
def test_one_batch_of_every_kind_is_each_alone(pages, budget):
    lm = LM()

    def requests():
        sampling = {"max_new_tokens": 30, "temperature": 0.9}
        return {
            "plain": lm.request(PROMPTS[0], seed=1, **sampling),
            "guided": lm.request(
                PROMPTS[1], seed=2, guide="cfg:negative=A sad dog,scale=2", **sampling
            ),
            "marked": lm.request(PROMPTS[2], seed=3, watermark="key=abc", **sampling),
            "bound": lm.request(
                PROMPTS[3], seed=4, grammar=Grammar("(the dog|a cat)+ ran"), **sampling
            ),
            "words": lm.request(PROMPTS[0], seed=5, keywords="dog;ball", **sampling),
            "schema": lm.request(
                PROMPTS[1],
                seed=6,
                schema={"type": "array", "items": {"type": "integer"}},
                **sampling,
            ),
            "stopped": lm.request(PROMPTS[2], seed=7, stop=["the"], **sampling),
            "sharp": lm.request(
                PROMPTS[3], seed=8, controls="top_k=5,min_p=0.1,dry=0.8", **sampling
            ),
        }

    expected = {name: alone(lm, request) for name, request in requests().items()}
    events = []
    with working(lm, pages=pages, max_running=5) as worker:
        for name, request in requests().items():
            worker.submit(Job(name, request, budget=budget))
            events += worker.step()
        drive(worker, events)
    assert {event.finish for event in events} <= {None, "stop", "length"}
    found = {name: tokens_of(events, name) for name in expected}
    cut = len(found["stopped"])  # it alone needs its text to know its end
    assert 0 < cut <= 30
    expected["stopped"] = expected["stopped"][:cut]
    assert found == expected

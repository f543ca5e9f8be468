"""A server tunes itself while idle: no answer changes, no page is lost, requests come first."""

import asyncio
import threading
from dataclasses import replace

import pytest

from paceline import LM
from paceline.core import Cost
from paceline.drafters.plain import Plain
from paceline.drafters.suffix import Suffix
from paceline.planning.idle_tuning import IdleTuner, TuningArm
from paceline.serving import service as service_module
from paceline.serving.messages import Job
from paceline.serving.service import Service
from paceline.serving.worker import Worker


@pytest.fixture
def lm():
    with LM(threads=1) as lm:
        yield lm


def run(worker, lm, name, **options):
    """Run a request to its end and return its tokens."""
    request = lm.request("Once upon a time", max_new_tokens=12, ignore_eos=True, **options)
    worker.submit(Job(name, request))
    events = []
    while not worker.idle:
        events += worker.step()
    assert not [event.error for event in events if event.error]
    return [token for event in events for token in event.tokens], events[-1], request


def feed(tuner, worker, lm, count=2):
    """Let a tuner see requests that end."""
    for number in range(count):
        tokens, event, request = run(worker, lm, f"fed {number}")
        tuner.on_event(Job("fed", request), event)
    return tokens


def finish(tuner):
    steps = 0
    while tuner.step():
        steps += 1
    return steps


def test_nothing_is_measured_before_there_are_requests(lm):
    tuner = IdleTuner(Worker(lm))
    assert not tuner.step()
    assert tuner.switches == []


def test_all_arms_are_measured_and_every_page_is_given_back(lm):
    worker = Worker(lm)
    tuner = IdleTuner(worker, clock=lambda: 0.0)  # no time passes: nothing is faster
    feed(tuner, worker, lm)
    used = lm.engine.memory.used
    assert finish(tuner) > 20
    assert lm.engine.memory.used == used
    assert tuner.switches == []
    assert not tuner.step()  # until there are further requests


def test_a_faster_drafter_is_switched_to_and_answers_stay(lm, monkeypatch):
    worker = Worker(lm)
    tuner = IdleTuner(worker, threads=False)
    before = feed(tuner, worker, lm)
    monkeypatch.setattr(tuner, "_speed", lambda arm: 9.0 if arm.method == Suffix() else 1.0)
    finish(tuner)
    assert tuner.switches == ["suffix@auto instead of blend@auto"]
    assert run(worker, lm, "after")[0] == before
    predicted, *_ = run(worker, lm, "predicted", prediction="Once upon a time there was")
    assert predicted == before  # by the configured drafter, which reads predictions
    assert (
        run(worker, lm, "sampled", temperature=1.0, seed=3)[0]
        == (
            lm.generate(
                "Once upon a time", max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=3
            )
        ).tokens
    )


def test_a_slightly_faster_drafter_is_not(lm, monkeypatch):
    worker = Worker(lm)
    tuner = IdleTuner(worker, threads=False)
    feed(tuner, worker, lm)
    monkeypatch.setattr(tuner, "_speed", lambda arm: 1.04 if arm.method == Suffix() else 1.0)
    finish(tuner)
    assert tuner.switches == []


def test_a_request_ends_a_measurement_and_frees_its_pages(lm):
    worker = Worker(lm)
    tuner = IdleTuner(worker, threads=False)
    feed(tuner, worker, lm)
    used = lm.engine.memory.used
    for _ in range(3):
        assert tuner.step()
    assert lm.engine.memory.used > used
    tuner.on_submit(Job("new", lm.request("Once", max_new_tokens=2)))
    assert lm.engine.memory.used == used
    assert finish(tuner) > 20  # it begins anew


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ((True, True), {"blend@auto", "plain@auto", "suffix@auto"}),
        ((False, True), {"blend@auto", "blend@4"}),
        ((True, False), {"blend@4", "suffix@4"}),
        ((False, False), {"blend@4"}),
    ],
)
def test_what_is_given_stays(allowed, expected):
    drafter, budget = allowed
    with LM(threads=1, budget="auto" if drafter and budget else 4) as lm:
        tuner = IdleTuner(Worker(lm), drafter=drafter, budget=budget)
        names = {arm.name for arm in tuner._arms()}
    assert expected <= names
    if not drafter:
        assert names == expected
    if not budget:
        assert not [name for name in names if name.endswith("auto")]


@pytest.mark.parametrize(("gain", "threads"), [(2.0, 2), (1.01, 1)])
def test_threads_are_switched_where_passes_are_clearly_faster(lm, monkeypatch, gain, threads):
    monkeypatch.setattr("paceline.planning.idle_tuning.usable_cores", lambda: 2)
    worker = Worker(lm)
    tuner = IdleTuner(worker, drafter=False, budget=False)
    before = feed(tuner, worker, lm)
    known = worker.governor.cost
    monkeypatch.setattr(
        tuner, "_pass_seconds", lambda sequence, size, count, now: size / gain ** (count - 1)
    )
    finish(tuner)
    assert lm.engine.threads == threads
    assert bool(tuner.switches) == (threads == 2)
    if threads == 2:
        assert worker.governor.cost.at(1) == pytest.approx(known.at(1) / 2)
    assert run(worker, lm, "after")[0] == before


def test_passes_with_other_threads_leave_the_number_as_it_was(lm):
    tuner = IdleTuner(Worker(lm))
    sequence = lm.engine.start([1, 2, 3])
    assert tuner._pass_seconds(sequence, 8, 2, 1) > 0
    assert lm.engine.threads == 1
    lm.engine.release(sequence)


def test_a_worker_switches_and_goes_back(lm):
    worker = Worker(lm)
    before = run(worker, lm, "one")[0]
    worker.switch(Plain(), 4, Cost((1, 2), (1.0, 2.0)))
    assert worker.default_budget == 4
    assert run(worker, lm, "two")[0] == before
    worker.switch(lm.drafter_method, None)
    assert worker.default_budget is None
    assert run(worker, lm, "three")[0] == before


def test_arms_have_names():
    assert TuningArm(Suffix(), None).name == "suffix@auto"
    assert TuningArm(Plain(), 3).name == "plain@3"


class Counting:
    """A task for idle times of some steps; fails at one of them."""

    def __init__(self, steps, fails=-1):
        self.left, self.fails, self.done = steps, fails, threading.Event()
        self.steps = 0

    def step(self):
        self.steps += 1
        if self.steps == self.fails:
            self.done.set()
            raise ZeroDivisionError
        self.left -= 1
        if self.left == 0:
            self.done.set()
        return self.left > 0


async def answer(service, request):
    stream = await service.stream(Job("one", request))
    return [token async for event in stream for token in event.tokens]


@pytest.mark.parametrize("fails", [-1, 2])
def test_a_service_does_its_task_while_idle_and_answers_as_before(lm, monkeypatch, fails):
    monkeypatch.setattr(service_module, "_QUIET", 0.01)
    request = lm.request("Once upon a time", max_new_tokens=8, ignore_eos=True)
    expected = lm.generate("Once upon a time", max_new_tokens=8, ignore_eos=True).tokens
    service = Service(Worker(lm))
    task = Counting(5, fails)
    service.idle_tasks.append(task)
    service.start()
    try:
        assert task.done.wait(20)
        assert asyncio.run(answer(service, request)) == expected
        assert service.failures == 0
        assert task.steps >= (5 if fails < 0 else 2)
    finally:
        service.stop()
    assert (task not in service.idle_tasks) == (fails > 0)


def test_a_tuned_service_answers_the_same(lm, monkeypatch):
    monkeypatch.setattr(service_module, "_QUIET", 0.0)
    service = Service(Worker(lm))
    tuner = IdleTuner(service.worker)
    service.idle_tasks.append(tuner)
    service.observers.append(tuner)
    monkeypatch.setattr(tuner, "_speed", lambda arm: 9.0 if arm.method == Suffix() else 1.0)
    expected = lm.generate("Once upon a time", max_new_tokens=8, ignore_eos=True).tokens
    request = lm.request("Once upon a time", max_new_tokens=8, ignore_eos=True)
    service.start()
    try:
        for number in range(6):
            found = asyncio.run(answer(service, replace(request, seed=number)))
            assert found == expected
    finally:
        service.stop()
    assert service.failures == 0

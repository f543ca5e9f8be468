"""A server warms itself while idle: requests come first, answers are kept, no answer changes."""

import itertools
import shutil

import pytest

from paceline import LM
from paceline.cli.serve import _warm_while_idle
from paceline.models.trace import join_traces, known_trace, trace_path
from paceline.serving.idle_warming import IdleWarming
from paceline.serving.messages import Job
from paceline.serving.service import Service
from paceline.serving.worker import Worker
from tests.conftest import shared


@pytest.fixture
def lm(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with LM(threads=1, drafter="blend", budget=4) as lm:
        yield lm


def prompts(lm):
    return itertools.cycle([lm.encode("Once upon a time"), lm.encode("The dog")])


def run(worker, lm, name):
    worker.submit(Job(name, lm.request("Once upon a time", max_new_tokens=40, ignore_eos=True)))
    events = []
    while not worker.idle:
        events += worker.step()
    return [token for event in events for token in event.tokens], sum(e.passes for e in events)


def finish(task):
    while task.step():
        pass


def test_the_trace_is_kept_and_drafters_know_it_at_once(lm):
    worker = Worker(lm)
    cold, passes = run(Worker(lm), lm, "cold")
    lm.drafter.reset()
    task = IdleWarming(worker, prompts(lm), 1500)
    pages = lm.engine.memory.used
    finish(task)
    assert task.done
    assert not task.step()
    assert lm.engine.memory.used == pages
    trace = known_trace(lm.model, lm.model.config.vocab_size)
    assert len(trace) == task.written >= 1500
    warm, fewer = run(worker, lm, "warm")
    assert warm == cold
    assert fewer < passes


def test_requests_come_first_and_what_was_finished_stays(lm):
    worker = Worker(lm)
    task = IdleWarming(worker, prompts(lm), 4000)
    while not task.written:
        assert task.step()
    written, pages = task.written, lm.engine.memory.used
    worker.submit(Job("a", lm.request("Once", max_new_tokens=4)))
    assert not task.step()  # the worker is not idle
    task.on_submit(Job("a", lm.request("Once", max_new_tokens=4)))
    assert lm.engine.memory.used < pages
    while not worker.idle:
        worker.step()
    assert task.step()
    assert task.written >= written


def test_a_request_never_waits_for_more_than_a_short_pass(lm, monkeypatch):
    prompt = lm.encode("Once upon a time there was a little dog. " * 4)
    worker = Worker(lm)  # measures the cost of passes of many sizes
    sizes, forward = [], lm.engine.forward

    def counted(parts, *args, **options):
        sizes.append(sum(len(tree) for _, tree in parts))
        return forward(parts, *args, **options)

    monkeypatch.setattr(lm.engine, "forward", counted)
    task = IdleWarming(worker, itertools.repeat(prompt), 200)
    steps = 0
    while not task.written:
        before = len(sizes)
        assert task.step()
        assert len(sizes) <= before + 1
        steps += 1
    assert len(prompt) > 48
    assert max(sizes) == 16
    assert steps > 4 * (len(prompt) - 1) // 16


def test_an_earlier_trace_is_continued_and_an_enough_one_left_alone(lm):
    finish(IdleWarming(Worker(lm), prompts(lm), 600))
    with LM(threads=1, drafter="blend", budget=4) as again:
        first = known_trace(again.model, again.model.config.vocab_size)
        assert IdleWarming(Worker(again), prompts(again), 600).done
        task = IdleWarming(Worker(again), prompts(again), 1400)
        assert task.written == len(first)
        finish(task)
        longer = known_trace(again.model, again.model.config.vocab_size)
        assert len(longer) >= 1400
        assert (longer.tokens[: len(first)] == first.tokens).all()
        assert (longer.tokens[len(first) :][:200] != first.tokens[:200]).any()


def test_traces_that_are_joined_keep_their_texts(lm):
    finish(IdleWarming(Worker(lm), prompts(lm), 600))
    trace = known_trace(lm.model, lm.model.config.vocab_size)
    twice = join_traces([trace, trace])
    texts = [twice.tokens[text].tolist() for text in twice.texts()]
    assert texts == 2 * [trace.tokens[text].tolist() for text in trace.texts()]


def test_a_full_disk_ends_nothing(lm, monkeypatch):
    trace_path(lm.model).parent.mkdir(parents=True, exist_ok=True)
    trace_path(lm.model).mkdir()
    task = IdleWarming(Worker(lm), prompts(lm), 600)
    finish(task)
    assert task.done


@pytest.mark.parametrize(
    ("template", "drafter", "warms"),
    [(True, "blend", True), (True, "plain", False), (False, "blend", False)],
)
def test_chat_models_whose_drafters_learn_are_warmed(
    tmp_path, monkeypatch, template, drafter, warms
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    shutil.copytree(shared("models", "stories260K"), model)
    if template:
        (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}:")
    with LM(model, threads=1, drafter=drafter) as lm:
        service = Service(Worker(lm))
        _warm_while_idle(service)
        assert len(service.idle_tasks) == len(service.observers) == warms
        for task in service.idle_tasks:
            assert task.step()
            task.on_submit(Job("a", lm.request("Once", max_new_tokens=4)))

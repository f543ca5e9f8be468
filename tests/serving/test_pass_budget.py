"""Drafts and guides read long texts in parts: nobody's stream waits for all of one."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.core import Cost
from paceline.decoding.governor import Governor
from paceline.drafters.base import engines_of
from paceline.serving import worker as serving
from paceline.serving.messages import Job
from paceline.serving.pass_budget import CHUNK, PassBudget, prefill_tokens, relative_cost
from tests.conftest import shared
from tests.serving.test_kv_budget import alone, watched
from tests.serving.test_worker import PROMPTS, drive, tokens_of

TOKENS = 16  # that a pass with streams may carry, whatever this machine's cost
LONG = " ".join(PROMPTS) * 8
STORY = "One day a girl found a red ball. " * 12


@pytest.fixture(scope="module")
def story():
    return shared("models", "stories260K")


@pytest.fixture(scope="module")
def plain(story):
    return LM(story, drafter="plain", threads=1)


@pytest.fixture(scope="module")
def lm(story):
    found = LM(story, drafter=f"model:path={story},format=int8", threads=1)
    found.request("a", guide=f"contrastive:{story}")  # opens it
    return found


@contextlib.contextmanager
def working(lm, **options):
    """A worker; and for each of its passes whether nobody waited, and what was read for it.

    That is what drafts ran besides trees, and guides with them, in tokens of the model.
    """
    passes = []

    def look(engine, batch, rows):
        if rows == "none" or engine in lm.guide_models.loaded:
            passes[-1][1] += sum(len(tree) for _, tree in batch) * relative_cost(engine, lm.engine)

    engines = [lm.engine, *engines_of(lm.drafter), *lm.guide_models.loaded]
    with pytest.MonkeyPatch.context() as patch, watched(engines, look):
        patch.setattr(
            serving, "prefill_tokens", lambda governor, n, prefill_slowdown: TOKENS if n else CHUNK
        )
        found = serving.Worker(lm, **options)
        step = found.step

        def counted():
            streams = sum(not job.missing for job in found.scheduler.running)
            passes.append([True, 0.0])
            events = step()
            passes[-1][0] = not streams or len(found.scheduler.running) < 2
            return events

        patch.setattr(found, "step", counted)
        yield found, passes
        found.close()
        assert all(engine.memory.used == 0 for engine in engines)


def longest(passes):
    """Most that was read in a pass that a stream waited for."""
    return max((read for alone, read in passes if not alone), default=0)


def test_a_draft_reads_a_long_prompt_beside_a_stream(lm, plain):
    quick = lm.request(PROMPTS[0], max_new_tokens=200, ignore_eos=True)
    late = lm.request(LONG, max_new_tokens=30, ignore_eos=True, temperature=0.0)
    with working(lm) as (worker, passes):
        worker.submit(Job("stream", quick, budget=0))
        events = worker.step()
        worker.submit(Job("long", late, budget=5))
        drive(worker, events)
        assert 0 < longest(passes) <= TOKENS < len(late.prompt) / 8
        streamed = [event for event in events if event.id == "stream" and event.tokens]
        assert len(streamed) >= len(late.prompt) // TOKENS
        assert tokens_of(events, "long") == alone(plain, late)
        origins = [origin for event in events if event.id == "long" for origin in event.origins]
        assert origins.count("model") > 5, "it was never caught up"

        passes.clear()  # the model knows the prompt now, another draft does not
        worker.submit(Job("stream", quick, budget=5))
        again = worker.step()
        worker.submit(Job("long", late, budget=5))
        drive(worker, again)
        assert 0 < longest(passes) <= TOKENS
        assert tokens_of(again, "long") == alone(plain, late)


@pytest.mark.parametrize(
    "guide",
    [
        "contrastive:{}",
        f"cfg:negative={STORY},scale=2",
        "gedi:{}, happy, sad",
        "air:{}, happy, sad",
    ],
)
def test_guides_read_before_they_are_used(lm, plain, story, guide):
    guide = guide.format(story)
    request = lm.request(LONG, max_new_tokens=6, ignore_eos=True, guide=guide)
    expected = alone(plain, plain.request(LONG, max_new_tokens=6, ignore_eos=True, guide=guide))
    quick = lm.request(PROMPTS[0], max_new_tokens=150, ignore_eos=True)
    with working(lm) as (worker, passes):
        worker.submit(Job("first", request, budget=0))
        drive(worker)  # the model knows the prompt now, the guide does not
        passes.clear()
        worker.submit(Job("stream", quick, budget=0))
        events = worker.step()
        worker.submit(Job("guided", request, budget=3))
        drive(worker, events)
        assert TOKENS / 2 < longest(passes) <= 3 * TOKENS  # trees of two texts among them
        assert tokens_of(events, "guided") == expected


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_no_pass_reads_more_than_it_may(lm, plain, story, data):
    guides = ((), f"contrastive:{story}", "cfg:negative=A sad dog,scale=2")
    with working(lm, max_running=data.draw(st.integers(2, 4))) as (worker, passes):
        expected, events = {}, []
        for number in range(data.draw(st.integers(2, 4))):
            text = data.draw(st.sampled_from([PROMPTS[1], STORY, LONG]))
            options = {
                "max_new_tokens": data.draw(st.integers(1, 30)),
                "guide": data.draw(st.sampled_from(guides)),
                "temperature": data.draw(st.sampled_from([0.0, 0.8])),
            }
            budget = data.draw(st.sampled_from([0, 4]))
            expected[str(number)] = alone(plain, plain.request(text, seed=number, **options))
            request = lm.request(text, seed=number, **options)
            worker.submit(Job(str(number), request, budget=budget))
            for _ in range(data.draw(st.integers(0, 6))):
                events += worker.step()
        drive(worker, events)
        assert longest(passes) <= 2 * TOKENS + 12 * len(expected)  # with the trees of guides
        assert {name: tokens_of(events, name) for name in expected} == expected


def test_a_pass_carries_what_its_streams_can_wait_for():
    governor = Governor(Cost((1, 2, 64), (1.0, 1.0, 9.0)))
    assert prefill_tokens(governor, 0, 2.0) == CHUNK
    few, more = prefill_tokens(governor, 1, 2.0), prefill_tokens(governor, 1, 3.0)
    assert 8 <= few < more < 64
    assert governor.seconds(1 + few - 1) <= 2.0 < governor.seconds(1 + few + 1)
    assert prefill_tokens(governor, 1, 1.0) == 8


def test_what_is_read_comes_from_one_budget(lm):
    reading = PassBudget(30, alone=False)
    assert reading.fit_part(20, extra_cost=1.0) == 10
    assert reading.allowance(cost=0.5) == 20
    reading.spend(20, cost=0.5)
    assert reading.allowance(cost=0.5) == 0
    assert [reading.min_allowance(0.5), reading.min_allowance(0.5)] == [8, 0]
    assert PassBudget(30, alone=True).fit_part(200, extra_cost=3.0) == 200
    small, large = sorted(
        (*engines_of(lm.drafter), lm.engine), key=lambda engine: engine.weight_bytes
    )
    assert relative_cost(small, large) == 1 / relative_cost(large, small) < 1

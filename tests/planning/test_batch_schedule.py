"""Batches of several users, pass by pass: by hand, and beside the server's scheduler."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.planning.batch_schedule import (
    MAX_STREAMS,
    MAX_USERS,
    StreamPass,
    batch_seconds,
    prompt_room,
)
from paceline.serving.pass_budget import CHUNK
from paceline.serving.scheduler import ScheduledJob, Scheduler


def seconds(prompts, answer=5, stream_pass=lambda n: StreamPass(1.0, 1.0), room=8, token=0.1):
    return batch_seconds(prompts, answer, stream_pass, token, lambda n: room if n else CHUNK)


def test_prompts_of_one_pass_are_answered_together():
    assert seconds([11, 11]) == pytest.approx(20 * 0.1 + 5)
    assert seconds([1]) == pytest.approx(5)


def test_a_prompt_that_waits_is_read_beside_the_answers():
    # 256 tokens; 5 passes of 8 tokens; the other 104 at once; the second answer alone.
    assert seconds([201, 201]) == pytest.approx(25.6 + 5 * 1.8 + 10.4 + 5)


def test_drafts_end_answers_sooner():
    assert seconds([1, 1], 8, lambda n: StreamPass(1.0, 2.0)) == pytest.approx(4)
    assert seconds([1, 1], 7, lambda n: StreamPass(1.0, 2.0)) == pytest.approx(4)


def test_more_requests_than_run_at_once_wait_for_a_place():
    assert seconds([1] * (MAX_STREAMS + 1)) == pytest.approx(10)
    assert seconds([1] * 4 * MAX_USERS) == pytest.approx(4 * seconds([1] * MAX_USERS))


def test_prompt_tokens_are_bounded_by_the_time_of_a_pass():
    assert prompt_room((1, 64), (1.0, 64.0), 0) == CHUNK
    assert prompt_room((1, 64), (1.0, 64.0), 20) == 20  # twice as long
    assert prompt_room((1, 64), (1.0, 64.0), 1) == 8
    assert prompt_room((1, 2048), (1.0, 1.0), 1) == CHUNK


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 30))
def test_passes_are_those_of_the_server(prompts, answer):
    """Every pass takes 1 s, and each prompt token 1 ms, here and by the scheduler itself."""
    scheduler, total = Scheduler(MAX_STREAMS), 0.0
    done = dict.fromkeys(map(str, range(len(prompts))), 0)
    for number, size in enumerate(prompts):
        scheduler.submit(ScheduledJob(str(number), text=size, most=size + answer))
    while scheduler.jobs:
        streams = sum(job.stage == "decoding" for job in scheduler.running)
        plan = scheduler.plan(0.0, 1 << 19, prompt_room((1, 64), (1.0, 64.0), streams))
        for name in plan.admitted:
            scheduler.ran(name, 0, scheduler.jobs[name].text)
        total += 1.0 * bool(plan.decoding) + 0.001 * sum(size for _, size in plan.parts)
        for name, size in plan.parts:
            if name in scheduler.jobs:
                job = scheduler.jobs[name]
                scheduler.ran(name, job.held + size, job.text)
        for name in plan.decoding:
            done[name] += 1
            job = scheduler.jobs[name]
            scheduler.ran(name, job.held + 1, job.text + 1)
            if done[name] == answer:
                scheduler.finished(name)
    found = batch_seconds(
        prompts,
        answer,
        lambda n: StreamPass(1.0, 1.0),
        0.001,
        lambda n: prompt_room((1, 64), (1.0, 64.0), n),
    )
    assert found == pytest.approx(total, rel=0.1, abs=1.5)
    assert np.isfinite(found)

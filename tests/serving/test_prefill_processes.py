"""Prefill replicas in processes of their own: killed, frozen, with other files."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager

import pytest

from paceline.compatibility import Side, check
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.errors import CombinationError, ModelError, RequestError
from paceline.kvcache.sliding_window import SlidingWindow
from paceline.serving.messages import Job
from paceline.serving.prefill.opening import open_prefill
from paceline.serving.prefill.settings import Prefill, PrefillSettings, check_prefill
from paceline.serving.worker import Worker
from tests.conftest import shared
from tests.serving.test_prefill import await_replica, opened, request, run, settle
from tests.serving.test_worker import alone, drive, tokens_of


@pytest.fixture(scope="module")
def lm():
    return opened(kv_format="fp16")


@contextmanager
def processes(lm, count=1, told=None, **settings):
    """A worker with replicas in processes, and these processes."""

    class Told(ProcessNodes):
        def launch(self, index, given):
            super().launch(index, given | (told or {}))

    folder = str(shared("models", "stories260K"))
    options = {"model": folder, "kv_format": lm.engine.kv_format, "threads": 1, **settings}
    prefill = Prefill(count, 64, Told)
    pool = open_prefill(lm.model, lm.engine, prefill, PrefillSettings(**options))
    worker = Worker(lm, prefill=pool)
    try:
        yield worker, pool._nodes.processes
    finally:
        worker.close()
        pool.close()
        assert not pool._nodes.processes
        assert lm.engine.memory.used == 0


def test_a_process_that_is_killed_while_it_reads_loses_nothing(lm):
    asked = {name: request(lm, 300, seed) for seed, name in enumerate("abc")}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with processes(lm) as (worker, running):
        assert run(worker, a=asked["a"])["a"] == expected["a"]
        settle(worker)
        os.kill(running[0].pid, signal.SIGSTOP)  # so that it is killed before it has read all
        worker.submit(Job("b", asked["b"]))
        events = worker.step()
        first = running[0]
        first.kill()
        first.wait(60)
        assert tokens_of(drive(worker, events, 50_000), "b") == expected["b"]
        counts = worker.prefill.statistics
        assert (counts.lost, counts.again, counts.prompts) == (1, 1, 1)
        await_replica(worker)
        assert running[0].pid != first.pid
        assert run(worker, c=asked["c"])["c"] == expected["c"]
        assert counts.prompts == 2


def test_a_process_that_is_silent_is_given_up(lm):
    asked = request(lm, 300, 5)
    with processes(lm, silence=2.0) as (worker, running):
        os.kill(running[0].pid, signal.SIGSTOP)
        assert run(worker, a=asked)["a"] == alone(lm, asked)
        assert worker.prefill.statistics.lost == 1


def test_all_processes_may_be_gone(lm):
    asked = {str(seed): request(lm, 300, seed) for seed in range(4)}
    expected = {name: alone(lm, each) for name, each in asked.items()}
    with processes(lm, 2) as (worker, running):
        for process in running.values():
            process.kill()
        assert run(worker, **asked) == expected


def other_files(copy):
    file = next(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    file.write_bytes(data)
    return {"model": str(copy)}, "prefill replica 1 has other files"


def no_file(copy):
    shutil.rmtree(copy)
    return {"model": str(copy)}, "prefill replica 1.*copy"


FAULTS = {
    "other files": other_files,
    "no file": no_file,
    "other format": lambda copy: ({"kv_format": "int8"}, "has other keys and values"),
    "other weights": lambda copy: ({"weight_format": "int8"}, "has other keys and values"),
    "no memory": lambda copy: ({"memory": 1000}, "prefill replica 1.*too few"),
    "nobody": lambda copy: ({"port": 1}, "prefill replica 1 ended with status.*look for"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_would_give_other_pages_is_refused_in_a_sentence(lm, fault, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shared("models", "stories260K"), copy)
    told, said = FAULTS[fault](copy)
    with pytest.raises((ModelError, RequestError), match=said) as caught, processes(lm, told=told):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [(0, 1), (65, 1), (1, 0)])
def test_numbers_are_checked(numbers):
    with pytest.raises(RequestError, match="expected"):
        Prefill(*numbers)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "reference"}, "prefill replicas and the engine reference"),
        ({"attention": "quest"}, "prefill replicas and the attention pattern quest"),
    ],
)
def test_engines_that_cannot_hand_over_pages_are_refused(options, said):
    options = dict(options)
    if options.get("engine") == "reference":
        from paceline import LM

        engine = LM(shared("models", "stories260K"), **options).engine
    else:
        engine = opened(**options).engine
    with pytest.raises(CombinationError, match=said):
        check_prefill(engine)


def test_a_policy_of_all_requests_and_a_cut_model_are_refused(lm):
    check_prefill(lm.engine)
    with pytest.raises(CombinationError, match="prefill replicas and the KV policy"):
        check_prefill(lm.engine, SlidingWindow().name)
    with pytest.raises(CombinationError, match="prefill replicas and weight_memory"):
        check_prefill(lm.engine, cut=True)
    with pytest.raises(CombinationError, match="lie on several nodes"):
        check({Side.PREFILL_APART: "prefill replicas", Side.PIPELINE: "a pipeline"})

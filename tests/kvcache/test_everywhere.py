"""A KV policy in the Python API, in batches, on the command line and in the server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paceline import LM
from paceline.cli.app import app
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.errors import MethodError, RequestError
from paceline.kvcache.h2o import H2O
from paceline.kvcache.sliding_window import SlidingWindow
from paceline.registry import kv_policies
from paceline.serving.messages import Job
from paceline.serving.operator_policy import OperatorPolicy
from paceline.serving.settings import ServerSettings
from paceline.serving.worker import Worker

SPEC = "h2o:budget=16,recent=4,every=4"
WINDOW = "sliding_window:budget=16,sinks=2,every=4"
PROMPTS = ("Once upon a time, there was", "The dog and the cat went to the big park and", "Lily")


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="recycle", budget=8)


def alone(lm, request) -> list[int]:
    drafter = lm.drafter_method.build(lm.draft_target)
    return Generation(lm.engine, drafter, request, Fixed(0)).run().tokens


def run(worker, jobs) -> dict[str, list[int]]:
    for job in jobs:
        worker.submit(job)
    outputs = {}
    while not worker.idle:
        for event in worker.step():
            assert not event.error, event.error
            if event.output is not None:
                outputs[event.id] = event.output.tokens
    return outputs


@pytest.mark.parametrize("pages", [None, 12])
def test_companions_in_a_batch_change_nothing(lm, pages) -> None:
    """Policies, none, samplers, prefixes and preemption beside each other: as alone."""
    requests = {
        f"{index} {policy} {temperature}": lm.request(
            prompt, max_new_tokens=60, temperature=temperature, seed=index, kv_policy=policy
        )
        for index, prompt in enumerate(PROMPTS)
        for policy in (None, SPEC, WINDOW)
        for temperature in (0.0, 0.8)
    }
    for index, kind in enumerate(kv_policies.methods().values()):  # every policy in one batch
        requests[kind.name] = lm.request(
            PROMPTS[index % 3],
            max_new_tokens=60,
            temperature=(0.0, 0.8)[index % 2],
            seed=index,
            kv_policy=kind.examples[1],
        )
    expected = {name: alone(lm, request) for name, request in requests.items()}
    memory = None if pages is None else pages * lm.engine.memory.page_bytes
    worker = Worker(lm, memory=memory)
    try:
        for _ in range(2):  # the second time the prefix cache knows the prompts
            jobs = [Job(name, request, budget=6) for name, request in requests.items()]
            assert run(worker, jobs) == expected
        with_policy = Job("again", requests[f"0 {SPEC} 0.0"])
        without = Job("other", requests["0 None 0.0"])
        worker.submit(with_policy)
        worker.submit(without)
        cached = {
            event.id: event.cached
            for _ in range(400)
            if not worker.idle
            for event in worker.step()
            if event.output is not None
        }
        assert cached["again"] == 0, "what others computed was not computed under the policy"
        if pages is None:
            assert cached["other"] > 0
    finally:
        worker.close()
    lm.engine.kv_limit = lm.engine.shared = None
    assert lm.engine.memory.used == 0


def test_a_worker_admits_more_where_a_policy_bounds_the_cache(lm) -> None:
    """Four pages hold no text of 400 tokens, but 16 rows of it."""
    worker = Worker(lm, memory=4 * lm.engine.memory.page_bytes)
    try:
        with pytest.raises(RequestError, match="memory"):
            worker.submit(Job("all", lm.request(PROMPTS[0], max_new_tokens=400, ignore_eos=True)))
        request = lm.request(PROMPTS[0], max_new_tokens=400, ignore_eos=True, kv_policy=WINDOW)
        [tokens] = run(worker, [Job("some", request)]).values()
        assert len(tokens) == 400
        assert worker.stats.freed_pages == 0, "it never held more than a page"
        request = lm.request(
            PROMPTS[0],
            max_new_tokens=200,
            ignore_eos=True,
            kv_policy="random:budget=64,recent=8,every=8",
        )
        run(worker, [Job("more", request)])
        assert worker.stats.freed_pages > 0
    finally:
        worker.close()
        lm.engine.kv_limit = lm.engine.shared = None


def test_the_api_takes_names_methods_and_false(lm) -> None:
    assert lm.request("a").kv_policy is None
    assert lm.request("a", kv_policy=SPEC).kv_policy == H2O(budget=16, recent=4, every=4)
    bounded = LM(kv_policy=SlidingWindow(budget=16, sinks=2, every=4), drafter="plain")
    assert bounded.request("a").kv_policy == SlidingWindow(budget=16, sinks=2, every=4)
    assert bounded.request("a", kv_policy=False).kv_policy is None
    text = bounded.generate(PROMPTS[0], max_new_tokens=60).text
    assert text == lm.generate(PROMPTS[0], max_new_tokens=60, kv_policy=WINDOW).text
    assert text == bounded.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=60)[0].text
    assert text != bounded.generate(PROMPTS[0], max_new_tokens=60, kv_policy=False).text


@pytest.mark.parametrize("wrong", [3, ["h2o"], True, b"h2o"])
def test_other_types_are_refused_in_one_sentence(lm, wrong) -> None:
    with pytest.raises((RequestError, MethodError), match="kv_policy"):
        lm.request("a", kv_policy=wrong)
    with pytest.raises((RequestError, MethodError), match="KV policy"):
        LM(kv_policy=wrong)


def test_what_does_not_go_together_is_refused(lm) -> None:
    with pytest.raises(MethodError, match=r"h2o.* do not go together: a search forks"):
        lm.search("a", "beam:width=2", kv_policy=SPEC, max_new_tokens=4)
    with pytest.raises(MethodError, match=r"KV policy h2o and a guide do not go together"):
        lm.generate("a", kv_policy=SPEC, guide="cfg:negative=b", max_new_tokens=4)
    blended = LM(drafter="blend:members=sparse_kv", budget=4)
    with pytest.raises(MethodError, match=r"h2o and the drafter .*sparse_kv.* do not go together"):
        blended.generate("a", kv_policy=SPEC, max_new_tokens=4)


def test_the_command_line() -> None:
    command = ["generate", PROMPTS[0], "--json", "--max-new-tokens", "60", "--drafter", "recycle"]
    found = [CliRunner().invoke(app, [*command, *more]) for more in ([], ["--kv-policy", WINDOW])]
    full, bounded = (json.loads(each.stdout) for each in found)
    assert (full["lossy"], full["kv_policy"]) == (False, None)
    assert (bounded["lossy"], bounded["kv_policy"]) == (True, "sliding_window")
    assert full["text"] != bounded["text"]
    refused = CliRunner().invoke(app, [*command, "--kv-policy", "h20"])
    assert refused.exit_code == 2
    assert "did you mean h2o" in refused.output


def test_a_server_chooses_the_policy_or_lets_requests_choose() -> None:
    with pytest.raises(MethodError, match="unknown kv policy"):
        ServerSettings(kv_policy="h20")
    assert ServerSettings(kv_policy=SPEC).kv_policy == SPEC
    fixed = OperatorPolicy(kv_policy=H2O())
    assert fixed.kv_policy_of(None) == H2O()
    for requested in (WINDOW, False):
        with pytest.raises(RequestError, match="this server chooses the KV policy"):
            fixed.kv_policy_of(requested)
    free = OperatorPolicy(kv_policy=H2O(), kv_policy_choice=True)
    assert free.kv_policy_of(False) is None
    assert free.kv_policy_of(WINDOW) == SlidingWindow(budget=16, sinks=2, every=4)

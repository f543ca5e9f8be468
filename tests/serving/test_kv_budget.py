"""One limit for the keys and values of every model that requests use; long texts read in parts."""

import contextlib
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import engines_of
from paceline.errors import RequestError
from paceline.serving import kv_budget
from paceline.serving import worker as serving
from paceline.serving.messages import Job
from paceline.serving.pass_runner import PassRunner
from tests.conftest import shared
from tests.serving.test_worker import PROMPTS, drive, tokens_of

DRAFT = "stories260K"
# Has sequences of its own in the model's engine.
OWN = "retrieved_context:sinks=1,chunk=4,pieces=2,tail=6,least=1.0,threshold=0.0"


@pytest.fixture(scope="module")
def plain():
    """The model alone: what everybody should get, from memory of its own."""
    return LM(shared("models", "bitstories-1M"), drafter="plain", threads=1)


@pytest.fixture(scope="module")
def lm():
    path = shared("models", DRAFT)
    return LM(shared("models", "bitstories-1M"), drafter=f"model:path={path}", threads=1)


@pytest.fixture(scope="module")
def opened():
    """Opens the model with a drafter, once."""
    return cache(lambda drafter: LM(shared("models", "bitstories-1M"), drafter=drafter, threads=1))


def alone(plain, request):
    return Generation(plain.engine, plain.drafter, request, Fixed(0)).run().tokens


def held(engines):
    """Bytes in pages, the empty ones too."""
    found = [engine.memory for engine in engines]
    return sum(memory.reserved * memory.page_bytes for memory in found)


@contextlib.contextmanager
def working(lm, **options):
    """A worker that carries the same everywhere, and leaves no page behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "prefill_tokens", lambda governor, streams, prefill_slowdown: 32)
        found = serving.Worker(lm, **options)
        try:
            yield found
        finally:
            found.close()
    engines = [lm.engine, *engines_of(lm.drafter), *lm.guide_models.loaded]
    assert [engine.memory.used for engine in engines] == [0] * len(engines)


@contextlib.contextmanager
def watched(engines, look):
    """Calls `look(engine, batch, rows)` after each pass of the engines."""
    with pytest.MonkeyPatch.context() as patch:
        for engine in engines:

            def forward(batch, rows="all", view=None, engine=engine, original=engine.forward):
                try:
                    return original(batch, rows, view)
                finally:
                    look(engine, batch, rows)

            patch.setattr(engine, "forward", forward)
        yield


@pytest.mark.parametrize(
    "drafter", ["model:path={}", "blend:members=model:path={},ask=always", OWN]
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_all_models_together_keep_the_limit_and_the_text(opened, plain, drafter, data):
    lm = opened(drafter.format(shared("models", DRAFT)))
    guides = ((), (), f"contrastive:{shared('models', DRAFT)}", "cfg:negative=A dog,scale=2")
    lm.request("a", guide=guides[2])  # opens it
    engines = {lm.engine, *engines_of(lm.drafter), *lm.guide_models.loaded}
    page = lm.engine.memory.page_bytes
    limit = int(page * data.draw(st.sampled_from([5.5, 7, 9, 14])))
    peaks = []
    max_running = data.draw(st.integers(1, 4))
    with (
        watched(engines, lambda *_: peaks.append(held(engines))),
        working(lm, max_running=max_running, memory=limit) as found,
    ):
        expected, events = {}, []
        for number in range(data.draw(st.integers(1, 5))):
            text = data.draw(st.sampled_from(PROMPTS)) * data.draw(st.sampled_from([1, 3, 12]))
            options = {
                "max_new_tokens": data.draw(st.integers(1, 40)),
                "temperature": data.draw(st.sampled_from([0.0, 0.8])),
                "guide": data.draw(st.sampled_from(guides)),
                "seed": number,
            }
            request = lm.request(text, **options)
            budget = data.draw(st.sampled_from([None, 4, 9]))
            try:
                found.submit(Job(str(number), request, budget=budget))
            except RequestError:  # it could never fit
                continue
            expected[str(number)] = alone(plain, plain.request(text, **options))
            for _ in range(data.draw(st.integers(0, 4))):
                events += found.step()
            if data.draw(st.integers(0, 9)) == 0:
                found.cancel(str(number))
                del expected[str(number)]
        drive(found, events)
    assert max(peaks, default=0) <= limit
    assert not [event.error for event in events if event.error]
    assert {name: tokens_of(events, name) for name in expected} == expected


def served(found, requests, budget=6):
    """What a worker makes of requests that come together."""
    for number, request in enumerate(requests):
        found.submit(Job(str(number), request, budget=budget))
    events = drive(found)
    return [tokens_of(events, str(number)) for number in range(len(requests))]


def together(lm, lengths, **options):
    return [
        lm.request(text * 4, max_new_tokens=length, seed=3, ignore_eos=True, **options)
        for text, length in zip(PROMPTS, lengths, strict=False)
    ]


def test_drafts_yield_before_requests_do(lm, plain, monkeypatch):
    """Three texts fit, but not with their drafts."""
    parked, park = [], PassRunner._park

    def noted(runner, place):
        parked.append((place.job.id, park(runner, place)))
        return parked[-1][1]

    monkeypatch.setattr(PassRunner, "_park", noted)
    lm.drafter.reset()  # other tests taught it
    requests = together(lm, [250, 250, 250])
    pages = sum(-(-(len(r.prompt) + 250) // 64) for r in requests)
    with working(
        lm, max_running=3, memory=int((pages + 3.2) * lm.engine.memory.page_bytes)
    ) as found:
        assert served(found, requests) == [alone(plain, request) for request in requests]
        assert any(gave for _, gave in parked)
        assert found.stats.preempted == 0
        assert found.stats.accepted["model"] > 0


def test_a_draft_that_never_finds_room_fails_nobody(lm, plain):
    with working(lm, max_running=2, memory=int(4.6 * lm.engine.memory.page_bytes)) as found:
        requests = together(lm, [60, 60])
        assert served(found, requests) == [alone(plain, request) for request in requests]


def test_memory_that_idle_drafts_hold_is_for_others(lm, plain):
    """The text of a drafter that nobody uses goes before texts of the past do."""
    page, [draft] = lm.engine.memory.page_bytes, lm.drafter.engines
    with working(lm, max_running=2, memory=int(14.6 * page)) as found:
        first = together(lm, [200])
        assert served(found, first) == [alone(plain, request) for request in first]
        assert draft.memory.used > 1
        later = lm.request([5] * 500, max_new_tokens=10, ignore_eos=True)
        assert served(found, [later], budget=0) == [alone(plain, later)]
        assert draft.memory.used == 0
        assert found.prefix_cache.pages > 0


def test_drafts_in_the_pages_of_the_model_yield_to_it(opened, plain):
    """Also those that a drafter still holds behind its request."""
    lm, page = opened(OWN), plain.engine.memory.page_bytes
    with working(lm, max_running=2, memory=int(9.6 * page)) as found:
        assert served(found, together(lm, [300])) == [
            alone(plain, each) for each in together(lm, [300])
        ]
        assert found.stats.accepted["retrieved_context"] > 0
        later = lm.request([5] * 420, max_new_tokens=28, ignore_eos=True)
        assert served(found, [later], budget=0) == [alone(plain, later)]
        assert found.stats.preempted == 0


def test_guides_count_and_what_never_fits_is_refused(plain):
    """With its guide a request takes twice the memory, in one engine or two."""
    lm = LM(shared("models", DRAFT), drafter="plain", threads=1)
    page = lm.engine.memory.page_bytes
    for guide in (f"contrastive:{shared('models', DRAFT)}", "cfg:negative=A sad dog,scale=2"):
        request = lm.request([7] * 200, max_new_tokens=56, ignore_eos=True, guide=guide)
        unguided = lm.request([7] * 200, max_new_tokens=56, ignore_eos=True)
        longer = lm.request([7] * 300, max_new_tokens=210, ignore_eos=True, guide=guide)
        expected = alone(lm, request)
        with working(lm, max_running=3, memory=15 * page) as found:
            found.submit(Job("plain", unguided))
            with pytest.raises(RequestError, match=r"needs memory for \d+ tokens, and there is"):
                found.submit(Job("longer", longer))
            for name in ("a", "b"):
                found.submit(
                    Job(
                        name, lm.request([7] * 200, max_new_tokens=56, ignore_eos=True, guide=guide)
                    )
                )
            events = drive(found)
            assert tokens_of(events, "a") == tokens_of(events, "b") == expected
            assert not [event.error for event in events if event.error]


def test_models_that_come_later_are_weighed(plain):
    lm = LM(shared("models", "bitstories-1M"), drafter="plain", threads=1)
    page, drafter = lm.engine.memory.page_bytes, f"model:path={shared('models', DRAFT)}"
    request = lm.request(PROMPTS[0], max_new_tokens=20, ignore_eos=True)
    with working(lm, memory=6 * page) as found:
        with pytest.raises(RequestError, match=r"one more model needs 3\.\d MB, more memory"):
            found.submit(Job("a", request, drafter=drafter, budget=5))
        assert found.idle
    with working(lm, memory=24 * page) as found:
        before = found.scheduler.capacity
        found.submit(Job("a", request, drafter=drafter, budget=5))
        weight = found._slots["a"].pool.first.engines[0].weight_bytes
        assert before - found.scheduler.capacity >= weight // page * 64
        assert tokens_of(drive(found), "a") == alone(plain, request)
        assert found.stats.accepted["model"] > 0


def test_a_draft_of_its_own_is_only_opened_where_there_is_room(plain):
    """With `pearl` every request has an engine, weights and all."""
    path = shared("models", DRAFT)
    lm = LM(
        shared("models", "bitstories-1M"), drafter=f"model:path={path},schedule=pearl", threads=1
    )
    page = lm.engine.memory.page_bytes
    requests = together(lm, [30, 30])
    expected = [alone(plain, request) for request in requests]
    for pages, engines in ((12, 1), (24, 2)):
        lm.drafter.reset()
        with working(lm, max_running=2, memory=pages * page) as found:
            assert served(found, requests) == expected
            assert (
                len({engine for each in found._pools.idle() for engine in each.engines}) == engines
            )


def test_room_is_what_all_models_leave(lm, monkeypatch):
    monkeypatch.setattr(kv_budget, "peak_bytes", lambda: 100_000_000)
    engine, drafts = lm.engine, lm.drafter.engines
    alone_, both = kv_budget.room(400_000_000, engine), kv_budget.room(400_000_000, engine, drafts)
    logits = 2 * 512 * 4 * drafts[0].config.vocab_size
    assert alone_ - both == logits
    with pytest.raises(RequestError, match="the model takes 100 MB"):
        kv_budget.room(160_000_000, engine, drafts)

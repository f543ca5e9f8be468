"""One limit for the keys and values of every model that requests use; long texts read in parts."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.errors import RequestError
from paceline.serving.asks import Ask
from paceline.serving.worker import Worker
from tests.conftest import shared
from tests.serving.test_worker import PROMPTS, drive, tokens_of

DRAFT = "stories260K"


@pytest.fixture(scope="module")
def plain():
    """The model alone: what everybody should get, from memory of its own."""
    return LM(shared("models", "bitstories-1M"), drafter="plain", threads=1)


@pytest.fixture(scope="module", params=["model:path={}", "blend:members=model:path={}"])
def lm(request):
    drafter = request.param.format(shared("models", DRAFT))
    return LM(shared("models", "bitstories-1M"), drafter=drafter, threads=1)


def alone(plain, request):
    return Generation(plain.engine, plain.drafter, request, Fixed(0)).run().tokens


def held(engines):
    """Bytes in pages, the empty ones too."""
    found = [engine.memory for engine in engines]
    return sum(memory.reserved * memory.page_bytes for memory in found)


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


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_all_models_together_keep_the_limit_and_the_text(lm, plain, data):
    engines = [lm.engine, *lm.drafter.engines]
    page = lm.engine.memory.page_bytes
    limit = int(page * data.draw(st.sampled_from([4.9, 6, 8.5, 14])))
    peaks = []
    with watched(engines, lambda *_: peaks.append(held(engines))):
        found = Worker(lm, places=data.draw(st.integers(1, 4)), memory=limit)
        expected, events = {}, []
        for number in range(data.draw(st.integers(1, 5))):
            text = data.draw(st.sampled_from(PROMPTS)) * data.draw(st.sampled_from([1, 3, 12]))
            request = lm.request(
                text,
                max_new_tokens=data.draw(st.integers(1, 40)),
                temperature=data.draw(st.sampled_from([0.0, 0.8])),
                seed=number,
            )
            budget = data.draw(st.sampled_from([None, 4, 9]))
            try:
                found.submit(Ask(str(number), request, budget=budget))
            except RequestError as error:
                assert "needs memory for" in str(error)
                continue
            expected[str(number)] = alone(plain, request)
            for _ in range(data.draw(st.integers(0, 4))):
                events += found.step()
            if data.draw(st.integers(0, 9)) == 0:
                found.cancel(str(number))
                del expected[str(number)]
        drive(found, events)
        found.close()
    assert max(peaks, default=0) <= limit
    assert {name: tokens_of(events, name) for name in expected} == expected
    assert [engine.memory.used for engine in engines] == [0] * len(engines)

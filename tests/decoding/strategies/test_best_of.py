from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from paceline import LM
from paceline.control.base import bind
from paceline.control.mirostat import Mirostat
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.best_of import BestOf
from paceline.errors import MethodError, RequestError
from tests.conftest import shared
from tests.decoding.strategies.conftest import log_probs
from tests.decoding.strategies.test_beam import Counting
from tests.decoding.test_loop import Root
from tests.toy import Oracle, ToyEngine

HOT = (Temperature(1.5),)


def plain(engine, request, seed):
    return Generation(engine, Root(), replace(request, seed=seed), Fixed(0)).run()


@hypothesis(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_each_sample_is_plain_decodings_for_its_seed(seed, n, together):
    engine = ToyEngine()
    request = Request((1, 2), 12, 1.5, seed, HOT, stop_tokens=frozenset({3}))
    task = Task(
        engine,
        request,
        drafter=Oracle(engine),
        another=lambda: Oracle(engine),
        budget=Fixed(6),
    )
    found = BestOf(n=n, returned=n, together=together).run(task)
    expected = [plain(engine, request, seed + i) for i in range(n)]
    key = lambda output: (output.tokens, output.finish)  # noqa: E731
    assert sorted(map(key, found)) == sorted(map(key, expected))
    for output in found:
        score = [
            log_probs(engine, [1, 2, *output.tokens[:i]])[token]
            for i, token in enumerate(output.tokens)
        ]
        assert output.score == pytest.approx(np.mean(score))
    assert [o.score for o in found] == sorted((o.score for o in found), reverse=True)
    assert engine.opened == 0


def test_samples_share_passes_and_are_drafted():
    engine = Counting()
    request = Request((1, 2), 20, 1.5, controls=HOT)
    assert BestOf(n=4).run(Task(engine, request))[0].passes == 20
    assert engine.most == 5  # and the prompt's own
    makers = {"drafter": Oracle(engine), "another": lambda: Oracle(engine)}
    for together in (1, 3, 4):
        task = Task(engine, request, budget=Fixed(8), **makers)
        found = BestOf(n=4, together=together, returned=4).run(task)
        assert sum(sum(output.accepted.values()) for output in found) > 0
        assert found[0].passes < 20 * -(-4 // together)
        assert engine.opened == 0


def test_a_scorer_of_ones_own_ranks_by_the_text(run, stories, engine, prompts):
    from paceline.decoding.text_stream import TextStream
    from paceline.models.detokenize import Detokenizer

    request = Request(prompts[0], 10, 1.0, controls=(Temperature(1.0),))
    task = Task(engine, request, lambda: TextStream(Detokenizer(stories.tokenizer)))
    found = BestOf(n=5, returned=5, scorer=len).run(task)
    sizes = [len(output.text) for output in found]
    assert sizes == sorted(sizes, reverse=True)
    assert [output.score for output in found] == sizes


def test_controls_that_follow_one_text_are_bound_for_each():
    engine = ToyEngine()

    def rebind(seed):
        request = Request((1, 2), 10, 1.0, seed)
        return bind([Mirostat(1.0), Temperature(1.0)], request, None)

    found = BestOf(n=3, returned=3).run(Task(engine, rebind(0), rebind=rebind))
    expected = [plain(engine, rebind(seed), seed).tokens for seed in range(3)]
    assert sorted(output.tokens for output in found) == sorted(expected)


@pytest.mark.parametrize("together", [1, 3])
def test_an_interrupted_search_gives_what_there_is(together):
    engine = Counting(interrupt=9)
    task = Task(engine, Request((1, 2), 20, 1.5, controls=HOT), drafter=Root())
    found = BestOf(n=6, returned=6, together=together).run(task)
    assert engine.opened == 0
    assert {output.finish for output in found} == {"interrupted"}
    assert len(found) == together


def test_bad_settings_are_refused():
    with pytest.raises(RequestError, match="give a temperature"):
        BestOf().run(Task(ToyEngine(), Request((1, 2), 9)))
    for settings in ({"n": 0}, {"n": 2, "returned": 3}, {"together": 0}):
        with pytest.raises(MethodError, match="best_of"):
            BestOf(**settings)


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), drafter="recycle", budget=6)


@pytest.mark.parametrize("guide", ["cfg:negative=A dog,scale=3", "dola:layers=1+3,alpha=0.01"])
def test_each_sample_is_guided_as_if_it_were_alone(lm, guide):
    ask = {"temperature": 1.0, "max_new_tokens": 12, "guide": guide}
    found = lm.search("Once upon a time", "best_of:n=3,returned=3,together=2", **ask)
    alone = [lm.generate("Once upon a time", **ask, seed=seed).tokens for seed in range(3)]
    assert sorted(output.tokens for output in found) == sorted(alone)
    free = lm.generate("Once upon a time", **{**ask, "guide": ()}).tokens
    assert free not in alone
    assert found[0].seconds.guide > 0


def test_marked_samples_differ_or_are_refused(lm):
    ask = {"temperature": 1.0, "max_new_tokens": 12}
    for kind in ("exponential", "inverse", "green"):
        mark = f"key=a,kind={kind}"
        found = lm.search("Once upon a time", "best_of:n=3,returned=3", **ask, watermark=mark)
        assert len({tuple(output.tokens) for output in found}) == 3
    with pytest.raises(MethodError, match="hardly differ"):
        lm.search("Once", "best_of", **ask, watermark="key=a,kind=synthid")
    assert lm.search("Once", "best_of:n=1", **ask, watermark="key=a,kind=synthid")


def test_noise_that_is_bound_to_one_seed_is_not_used_for_others():
    task = Task(ToyEngine(), Request((1, 2), 9, 1.0, noise=lambda position: 1))
    with pytest.raises(MethodError, match="bound to one seed"):
        BestOf(n=2).run(task)

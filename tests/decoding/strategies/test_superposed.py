"""Superposed decoding: several continuations, ranked by what the model itself thinks of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.top_k import TopK
from paceline.core import Request, TokenTree
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.superposed import Ngrams, Superposed, _Draft, _Superposition
from paceline.engines import open_engine
from paceline.errors import MethodError, RequestError
from paceline.models import load
from tests.conftest import shared
from tests.toy import ToyEngine

PROMPT = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module", params=["native", "reference"])
def lm(request):
    if request.param == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    return LM(shared("models", "stories260K"), engine=request.param, drafter="plain")


def superposed(engine, prompt, k, length, alpha=0.0, known=(), **options):
    request = Request(tuple(int(token) for token in prompt), length, **options)
    task = Task(engine, request, known_texts=lambda: known)
    return Superposed(k, k, alpha).run(task)


def prompt_of(lm):
    return np.array(lm.tokenizer.encode(PROMPT), np.int32)


def test_one_continuation_is_greedy_decoding(lm):
    plain = lm.generate(PROMPT, max_new_tokens=20, temperature=0.0, ignore_eos=True)
    (only,) = superposed(lm.engine, prompt_of(lm), 1, 20)
    assert only.tokens == plain.tokens
    assert only.finish == "length"


def test_scores_are_the_models_own_and_fall(lm):
    prompt = prompt_of(lm)
    found = superposed(lm.engine, prompt, 5, 9)
    assert len({tuple(one.tokens) for one in found}) == 5
    assert {(one.passes, one.nodes) for one in found} == {(10, found[0].nodes)}
    assert 9 + 9 <= found[0].nodes <= 9 + 1 + 5 * 8
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert len(one.tokens) == 9
        sequence = lm.engine.start(prompt[:-1])
        chain = TokenTree.chain(np.array([prompt[-1], *one.tokens[:-1]], np.int32))
        logits = lm.engine.forward([(sequence, chain)]).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected = sum(logs[place, token] for place, token in enumerate(one.tokens))
        assert one.score == pytest.approx(expected, abs=1e-3)
        lm.engine.release(sequence)


def test_continuations_end_at_stop_tokens_and_leave_no_sequence():
    folder = shared("models", "stories260K")
    engine = open_engine(load(folder), "native", threads=1)
    opened = []
    engine.open, start = lambda: opened.append(start()) or opened[-1], engine.open
    prompt = np.array([1, 403, 407], np.int32)
    free = superposed(engine, prompt, 4, 6)
    stop = free[0].tokens[2]
    found = superposed(engine, prompt, 4, 6, stop_tokens=frozenset({stop}))
    assert any(one.tokens[-1] == stop and one.finish == "stop" for one in found)
    assert all(stop not in one.tokens[:-1] for one in found)
    assert all(sequence.bytes == 0 for sequence in opened)


def test_ngrams_say_which_token_belongs_to_which_draft():
    """The model finds 2 likelier than 3, but known texts say 0 2 and 1 3."""
    logits = np.array([[-9, -9, 2, 1.9]], np.float32)
    known = [np.array([0, 2, -1, 1, 3] * 9, np.int32)]
    for alpha, expected in ((0.0, {(0, 2), (1, 2)}), (0.5, {(0, 2), (1, 3)})):
        task = Task(ToyEngine(), Request((0,), 5), known_texts=lambda: known)
        superposition = _Superposition(Superposed(2, 2, alpha), task)
        superposition.drafts = [_Draft((0,), -0.7), _Draft((1,), -0.7)]
        found = superposition.extended(logits)
        assert {draft.tokens for draft in found} == expected


def counted(texts, context, token, base):
    """The definition, written plainly."""
    prob = base
    for back in range(1, 6):
        end = context[-back:]
        if back > len(context):
            break
        after = [
            text[i + back]
            for text in texts
            for i in range(len(text) - back)
            if text[i : i + back] == end
        ]
        if not after:
            break
        kinds = len(set(after))
        prob = (after.count(token) + kinds * prob) / (len(after) + kinds)
    return prob


TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=20), max_size=4)


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_ngrams_count_as_defined(texts, context):
    base = np.array([0.4, 0.3, 0.2, 0.1])
    ngrams = Ngrams([np.array(text, np.int32) for text in texts])
    found = ngrams.probs(np.array(context, np.int32), np.arange(4, dtype=np.int32), base)
    expected = [counted(texts, context, token, base[token]) for token in range(4)]
    np.testing.assert_allclose(found, expected)
    assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("k", "alpha", "said"),
    [
        (0, 0.5, "superposed:width is 0, expected 1 to 64"),
        (65, 0.5, "superposed:width is 65"),
        (2, 1.5, "superposed:alpha is 1.5"),
        (2, float("nan"), "superposed:alpha is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(k, alpha, said):
    with pytest.raises(MethodError, match=said):
        Superposed(k, k, alpha)


def test_a_text_ends_with_the_context(lm):
    (only,) = superposed(lm.engine, np.arange(3, 500), 1, 100)
    assert (only.finish, len(only.tokens)) == ("context", lm.engine.config.context - 497)


def test_stop_strings_end_a_continuation(lm):
    free = lm.search(PROMPT, "superposed:width=4,returned=4", max_new_tokens=8)
    stop = free[0].text[4:8]
    found = lm.search(PROMPT, "superposed:width=4,returned=4", max_new_tokens=8, stop=[stop])
    ended = [output for output in found if output.finish == "stop"]
    assert ended
    assert not any(stop in output.text for output in found)


def test_an_interrupt_gives_what_there_is(lm, monkeypatch):
    passes, mixed = iter(range(9)), lm.engine.forward_mixed

    def interrupted(*words):
        if next(passes) == 3:
            raise KeyboardInterrupt
        return mixed(*words)

    monkeypatch.setattr(lm.engine, "forward_mixed", interrupted)
    found = superposed(lm.engine, prompt_of(lm), 3, 9)
    assert [output.finish for output in found] == ["interrupted"] * 3
    assert [len(output.tokens) for output in found] == [4] * 3


def test_what_it_cannot_do_is_refused(lm):
    with pytest.raises(MethodError, match="needs an engine that can run weighted sums"):
        superposed(ToyEngine(), np.array([1], np.int32), 2, 3)
    with pytest.raises(MethodError, match="all drafts share one row"):
        superposed(lm.engine, prompt_of(lm), 2, 3, controls=(TopK(5),))
    with pytest.raises(
        RequestError, match="the strategy superposed do not go together: the strategy draws nothing"
    ):
        superposed(lm.engine, prompt_of(lm), 2, 3, temperature=0.5)

"""Warm starts: traces go round, are read with suspicion, and save passes."""

import dataclasses
import itertools

import numpy as np
import pytest

from paceline.core import Request, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.history.warm_start import replay
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models.trace import Trace, read_trace, write_trace
from paceline.registry import drafters
from paceline.training.prompt_mix import mixed_prompts
from paceline.training.self_text import self_answers, selftext
from tests.toy import ToyEngine


@pytest.fixture(scope="module")
def trace():
    return selftext(ToyEngine(), 600, [1], frozenset({2}), seed=3)


def test_texts_end_where_the_model_ends_them(trace):
    assert 600 <= len(trace) < 616
    assert len(trace.starts) > 1
    for text in trace.texts():
        assert (trace.tokens[text][1:] != 2).all()  # what ends a text is not run any more


def test_half_of_the_texts_begin_with_each_token_in_turn(trace):
    second = [int(trace.tokens[text][0]) for text in trace.texts()]
    assert second.count(1) >= len(second) // 3
    assert len(set(second)) > 3


def test_rows_are_the_models_own():
    engine = ToyEngine()
    trace = selftext(engine, 40, [], frozenset(), seed=1)
    text = next(iter(trace.texts()))
    tokens = trace.tokens[text]
    sequence = engine.open()
    logits = engine.forward([(sequence, TokenTree.chain(tokens))]).copy()
    assert (logits.argmax(axis=1) == trace.top_tokens[text][:, 0]).all()


def test_the_same_seed_writes_the_same():
    one, two = (selftext(ToyEngine(), 50, [1], frozenset(), seed=5) for _ in range(2))
    assert (one.tokens == two.tokens).all()
    other = selftext(ToyEngine(), 50, [1], frozenset(), seed=6)
    assert one.tokens.tolist() != other.tokens.tolist()


def test_answers_follow_their_prompts():
    engine, prompts = ToyEngine(), [[1, 3], [4, 5, 6]]
    trace = self_answers(engine, 60, prompts, frozenset({2}), seed=1, longest=5)
    firsts = [int(trace.tokens[text][0]) for text in trace.texts()]
    assert set(firsts) == {3, 6}  # the last token of each prompt, in turn
    assert all(len(trace.tokens[text]) <= 5 for text in trace.texts())
    texts = {text.start: trace.tokens[text] for text in trace.texts()}
    for start, tokens in texts.items():
        prompt = next(prompt for prompt in prompts if prompt[-1] == tokens[0])
        sequence = engine.open()
        logits = engine.forward([(sequence, TokenTree.chain(np.append(prompt[:-1], tokens)))])
        own = logits[len(prompt) - 1 :].argmax(axis=1)
        assert (own == trace.top_tokens[start : start + len(tokens), 0]).all()
        engine.release(sequence)


def test_prompts_without_room_are_left_out_and_none_at_all_is_refused():
    engine = ToyEngine()
    long = [1] * engine.config.context
    trace = self_answers(engine, 20, [long, [3], []], frozenset(), seed=1, longest=4)
    assert {int(trace.tokens[text][0]) for text in trace.texts()} == {3}
    with pytest.raises(RequestError, match="no prompt has 1 to"):
        self_answers(engine, 20, [long, []], frozenset())
    with pytest.raises(RequestError):
        self_answers(engine, 0, [[3]], frozenset())


def test_the_mix_of_prompts_fills_its_templates_and_repeats_by_its_seed():
    prompts = list(itertools.islice(mixed_prompts(3), 300))
    assert prompts == list(itertools.islice(mixed_prompts(3), 300))
    assert prompts != list(itertools.islice(mixed_prompts(4), 300))
    assert len(set(prompts)) > 250
    assert not any("{" in prompt and "}" in prompt and "small" in prompt for prompt in prompts)
    assert any(prompt.startswith("Translate German to English: ") for prompt in prompts)


def test_goes_round(trace, tmp_path):
    path = tmp_path / "trace.safetensors"
    write_trace(path, trace)
    back = read_trace(path, 11)
    for field in dataclasses.fields(Trace):
        assert np.array_equal(getattr(back, field.name), getattr(trace, field.name))


def test_damaged_traces_are_refused(trace, tmp_path):
    path = tmp_path / "trace.safetensors"
    write_trace(path, trace)
    with pytest.raises(ModelError, match="no trace of this model"):
        read_trace(path, 5)  # another vocabulary
    for field, value in (
        ("top_probs", np.full_like(trace.top_probs, np.nan)),
        ("top_probs", trace.top_probs * 3 + 1),
        ("tokens", trace.tokens - 100),
        ("top_tokens", trace.top_tokens + 100),
    ):
        wrong = dataclasses.replace(trace, **{field: value})
        write_trace(path, wrong)
        with pytest.raises(ModelError, match="no trace of this model"):
            read_trace(path, 11)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError):
        read_trace(path, 11)


def test_impossible_traces_are_refused(trace):
    for field, value in (
        ("starts", np.array([1, 2], np.int32)),
        ("starts", np.array([0, 5, 5], np.int32)),
        ("starts", np.array([0, 700], np.int32)),
        ("starts", np.array([], np.int32)),
        ("tokens", trace.tokens[:-1]),
        ("top_probs", trace.top_probs[:, :1]),
    ):
        with pytest.raises(MethodError):
            dataclasses.replace(trace, **{field: value})


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 0.7), (10, 0.0), (10, float("nan"))])
def test_bad_numbers_are_refused(tokens, temperature):
    with pytest.raises(RequestError):
        selftext(ToyEngine(), tokens, [1], frozenset(), temperature)


@pytest.mark.parametrize("name", ["recycle", "blend"])
def test_a_warm_start_saves_passes_and_changes_nothing(trace, name):
    target = Target(11, ToyEngine(), trace=trace)
    request = Request(prompt=(1, 2, 3), max_new_tokens=60)

    def run(drafter):
        return Generation(ToyEngine(), drafter, request, Fixed(4)).run()

    warm = drafters.parse(name).build(target)
    cold = drafters.parse(f"{name}:warm=false").build(target)
    a, b = run(warm), run(cold)
    assert a.tokens == b.tokens
    assert a.passes < b.passes
    warm.reset()  # back to the warm start, not to nothing
    assert run(warm).passes == a.passes
    again = drafters.parse(name).build(target)
    for key, array in again.state().items():
        warm.reset()
        assert np.array_equal(array, warm.state()[key]), key


def test_a_warm_start_lets_no_member_rest(trace, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("paceline.drafters.blend.perf_counter", lambda: float(next(ticks)))
    drafter = drafters.parse("blend:members=lookahead_trie+trigram").build(Target(11, trace=trace))
    assert len(trace.starts) > 16
    assert [worth.resting for worth in drafter._worth] == [0, 0]


@pytest.mark.parametrize(
    "name", ["recycle", "suffix", "lookahead_trie", "trigram", "lookup", "plain"]
)
def test_any_drafter_can_live_through_a_trace(trace, name):
    drafter = drafters.parse(name).build(Target(11))
    replay(trace, drafter)
    request = Request(prompt=(1, 2, 3), max_new_tokens=20)
    plain = Generation(
        ToyEngine(), drafters.parse("plain").build(Target(11)), request, Fixed(0)
    ).run()
    assert Generation(ToyEngine(), drafter, request, Fixed(4)).run().tokens == plain.tokens

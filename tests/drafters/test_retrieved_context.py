"""Drafting from retrieved pieces; `tests/test_matrix.py` holds it to plain decoding."""

from collections import Counter
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.draft_model.retrieval import best_pieces
from paceline.errors import MemoryFullError, MethodError
from paceline.registry import drafters
from tests.conftest import shared
from tests.drafters.steps import check_tree
from tests.toy import ToyEngine

SHORT = "retrieved_context:sinks=1,chunk=4,pieces=2,tail=6,least=1.0"
SMALL = SHORT + ",threshold=0.0"
TEXT = st.lists(st.integers(0, 5), max_size=60)


def built(spec=SMALL, engine=None, vocab=11):
    return drafters.parse(spec).build(Target(vocab, engine or ToyEngine(vocab, context=200)))


def reference_scores(text, query, size):
    """BM25 by the book, a dictionary a piece."""

    def terms(tokens, after):
        return [*tokens, *zip(tokens, [*tokens[1:], *after], strict=False)]

    pieces = [
        Counter(terms(text[at : at + size], text[at + size : at + size + 1]))
        for at in range(0, len(text), size)
    ]
    lengths = [len(text[at : at + size]) for at in range(0, len(text), size)]
    mean, scores = sum(lengths) / len(lengths), []
    for piece, length in zip(pieces, lengths, strict=True):
        score = 0.0
        for term in set(terms(query, [])):
            within = sum(term in other for other in pieces)
            weight = log(1 + (len(pieces) - within + 0.5) / (within + 0.5))
            bound = 1.2 * (0.25 + 0.75 * length / mean)
            score += weight * piece[term] * 2.2 / (piece[term] + bound)
        scores.append(score)
    return scores


@settings(deadline=None)
@given(TEXT, TEXT, st.integers(1, 9), st.integers(0, 5))
def test_the_best_pieces_are_those_of_bm25(text, query, size, count):
    found = best_pieces(np.array(text, np.int32), np.array(query, np.int32), size, count)
    if not text or not query or not count:
        assert found == []
        return
    scores = reference_scores(text, query, size)
    assert found == sorted(set(found))
    assert len(found) == min(count, sum(score > 0 for score in scores))
    left = [score for piece, score in enumerate(scores) if piece not in found]
    assert all(scores[piece] > 0 for piece in found)
    assert not found or min(scores[p] for p in found) >= max(left, default=0.0) - 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=90))
def test_the_ends_and_pieces_between_are_read(prompt):
    method = drafters.parse(SMALL)
    chosen = method.chosen(np.array(prompt, np.int32)).tolist()
    assert chosen == sorted(set(chosen))
    assert (
        {0, *range(max(len(prompt) - 6, 0), len(prompt))} <= set(chosen) <= set(range(len(prompt)))
    )
    assert len(chosen) <= method.read == 15
    if len(prompt) <= 15:
        assert len(chosen) == len(prompt)


def test_the_piece_that_holds_the_answer_is_read():
    random = np.random.default_rng(0)
    prompt = random.integers(100, 200, 3000).astype(np.int32)
    prompt[1000:1010], prompt[-10:] = range(10), [3, 4, 5, 90, 91, 92, 93, 94, 95, 96]
    method = drafters.parse("retrieved_context:chunk=32,pieces=1,tail=64")
    assert {*range(1000, 1010)} & set(method.chosen(prompt).tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("spec", [SMALL, SHORT + ",width=1,stop=bandit"])
def test_output_is_that_of_plain_decoding(temperature, spec):
    drafter, plain = built(spec), built("plain")
    for seed in range(3):
        prompt = tuple(np.random.default_rng(seed).integers(0, 11, 42).tolist())
        controls = (Temperature(temperature),) if temperature else ()
        request = Request(prompt, 30, temperature, seed, controls)
        engine = ToyEngine(context=200)
        output = Generation(engine, drafter, request, Fixed(8)).run()
        expected = Generation(ToyEngine(context=200), plain, request, Fixed(0)).run()
        assert output.tokens == expected.tokens
        assert output.tokens_per_pass > 1.5
        assert engine.opened == 0


def test_the_draft_runs_on_the_short_text_only():
    engine = ToyEngine(context=200)
    lengths, forward = [], engine.forward

    def watched(batch, rows="all", view=None):
        lengths.extend(sequence.length + len(tree) for sequence, tree in batch)
        return forward(batch, rows, view)

    engine.forward = watched
    drafter, prompt = built(engine=engine), np.arange(150, dtype=np.int32) % 11
    drafter.begin(Request(tuple(prompt.tolist()), 8))
    tree = drafter.propose(prompt, 6)
    check_tree(tree, prompt[-1], 6, 11)
    assert len(tree) == 7
    assert max(lengths) <= 14 + 1 + 3 * 4  # the root, and three passes of four nodes
    drafter.release()
    assert engine.opened == 0


def test_prompts_that_are_too_short_are_not_drafted_for():
    drafter = built(SMALL.replace("least=1.0", "least=3.0"))
    for length, nodes in ((44, 1), (45, 5)):
        prompt = np.arange(length, dtype=np.int32) % 11
        drafter.begin(Request(tuple(prompt.tolist()), 8))
        assert drafter.follow(prompt) == (0 if nodes == 1 else 14)
        assert drafter.ready(prompt)
        assert len(drafter.propose(prompt, 4)) == nodes


def test_another_request_is_read_anew_and_forks_have_their_own_text():
    first = built()
    other = first.fork()
    for seed, drafter in enumerate((first, other, first, other)):
        prompt = np.random.default_rng(seed).integers(0, 11, 60 - 5 * seed).astype(np.int32)
        drafter.begin(Request(tuple(prompt.tolist()), 8))
        fresh = built()
        fresh.begin(Request(tuple(prompt.tolist()), 8))
        a, b = drafter.propose(prompt, 6), fresh.propose(prompt, 6)
        assert a.tokens.tolist() == b.tokens.tolist()


def test_without_room_nothing_is_drafted():
    engine = ToyEngine(context=200)

    def full(*_, **__):
        raise MemoryFullError("no page is left")

    drafter, prompt = built(engine=engine), np.arange(60, dtype=np.int32) % 11
    engine.forward = full
    drafter.begin(Request(tuple(prompt.tolist()), 8))
    assert len(drafter.propose(prompt, 4)) == 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("chunk=0", "retrieved_context:chunk is 0"),
        ("tail=0", "retrieved_context:tail is 0"),
        ("pieces=-1", "retrieved_context:pieces is -1"),
        ("least=0.5", "retrieved_context:least is 0.5"),
        ("path=a,least=2.0", "reads short prompts whole; leave least out"),
        ("format=int8", "is that of another checkpoint; name its path"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        drafters.parse(f"retrieved_context:{spec}")


def test_other_tokens_and_a_missing_engine_are_refused():
    with pytest.raises(MethodError, match="none was given; name a path"):
        drafters.parse("retrieved_context").build(Target(11))
    story = shared("models", "stories260K")
    with pytest.raises(MethodError, match="has other tokens than the target"):
        drafters.parse(f"retrieved_context:path={story}").build(Target(11, ToyEngine()))


def test_a_real_model_drafts_for_itself_and_for_a_larger_one():
    spec = "retrieved_context:sinks=4,chunk=16,pieces=2,tail=24"
    small = shared("models", "stories260K")
    prompt = "Once upon a time, a dog had a red ball. The cat saw it. " * 5 + "One day, the dog"
    plain = LM(small, drafter="plain", threads=1)
    expected = plain.generate(prompt, max_new_tokens=40, temperature=0.0)
    for each in (f"{spec},least=1.0,threshold=0.2", f"{spec},path={small}"):
        with LM(small, drafter=each, budget=8, threads=1) as lm:
            output = lm.generate(prompt, max_new_tokens=40, temperature=0.0)
            assert output.tokens == expected.tokens
            assert output.tokens_per_pass > 1.3

import json
from contextlib import suppress
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.core import Request
from paceline.decoding.walk import draw
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.noise import bits, gumbel, perturbation, stream, streams
from paceline.registry import watermarks
from paceline.watermarks.base import parse_watermark
from paceline.watermarks.green import tail
from paceline.watermarks.keys.alignment import best_alignment, resampled
from paceline.watermarks.keys.context import context_stream, context_streams, windows
from paceline.watermarks.synthid import tournament

SIZE = 50
KINDS = list(watermarks.methods())
SEQUENCES = ["exponential", "inverse"]


def row(seed, size=SIZE, spread=1.0):
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def written(mark, seed, length=50, size=SIZE, temperature=1.0):
    """A text drawn from random logits, with a watermark or without."""
    asked = Request((1, 2, 3, 4), length, temperature, seed)
    asked = asked if mark is None else mark.mark(asked)
    history = list(asked.prompt)
    for step in range(length):
        history.append(draw(row((seed, step), size), history, asked)[0])
    return history[4:]


def damaged(tokens, share, random, size=SIZE):
    """Random substitutions, insertions and deletions of a share of the tokens."""
    edited = list(tokens)
    for _ in range(round(share * len(tokens))):
        place, token = int(random.integers(len(edited))), int(random.integers(size))
        kind = random.integers(3)
        edited[place : place + (kind > 0)] = [] if kind == 2 else [token]
    return edited


def mark_of(kind, key="secret", **more):
    return parse_watermark(",".join([f"key={key}", f"kind={kind}", *more.get("settings", ())]))


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs a key"),
        ("kind=green", "needs a key"),
        ("key=", "key is empty"),
        ("key", "has no value"),
        ("key=a,key=b", "key is given twice"),
        ("key=a,kind=red", "unknown watermark"),
        ("key=a,kind=gren", "did you mean green"),
        ("key=a,delta=1", "unknown setting of exponential"),
        ("key=a,length=1", "expected 2 to 65536"),
        ("key=a,length=x", "expected int"),
        ("key=a,kind=green,gamma=1", "above 0 and below 1"),
        ("key=a,kind=green,gamma=nan", "above 0 and below 1"),
        ("key=a,kind=green,delta=-1", "0 to 100"),
        ("key=a,kind=green,context=0", "1 to 16"),
        ("key=a,kind=synthid,layers=65", "1 to 64"),
        ("key=a,kind=synthid,context=17", "1 to 16"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(text, said):
    with pytest.raises(PacelineError, match=said):
        parse_watermark(text)


@given(st.text(max_size=30) | st.from_regex(r"key=a,(kind|length|gamma)=[-0-9einfagr.]{0,6}"))
def test_any_text_is_a_watermark_or_refused(text):
    with suppress(PacelineError):
        parse_watermark(text)


def test_the_key_is_not_shown():
    for kind in KINDS:
        assert "secret" not in repr(mark_of(kind))


@pytest.mark.parametrize("kind", ["exponential", "inverse", "synthid"])
def test_greedy_decoding_leaves_nothing_to_mark(kind):
    with pytest.raises(RequestError, match=r"temperature 0.*(kind=|the watermark )green"):
        mark_of(kind).mark(Request((1,), 5))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_what_a_sequence_cannot_serve_is_refused(kind):
    with pytest.raises(MethodError, match="use --walk gumbel"):
        mark_of(kind).mark(Request((1,), 5, 1.0, walk="rejection"))
    with pytest.raises(RequestError, match="300 tokens and the watermark's sequence has 256"):
        mark_of(kind).mark(Request((1,), 300, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_evidence_is_refused(kind):
    with pytest.raises(RequestError, match="give more text"):
        mark_of(kind).detect([])


# ------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32), forbidden=st.integers(0, SIZE - 1), hot=st.booleans())
@settings(max_examples=30, deadline=None)
def test_marks_are_pure_and_leave_what_is_forbidden(kind, seed, forbidden, hot):
    asked = mark_of(kind).mark(Request((1, 2, 3, 4), 20, 1.0, seed))
    random = np.random.default_rng(seed)
    history = [1, 2, 3, 4]
    for _ in range(6):
        logits = row(random.integers(1 << 32), spread=30.0 if hot else 1.0)
        logits[:forbidden] = -np.inf
        before = logits.copy()
        token, margin = draw(logits, history, asked, want_margin=True)
        assert (token, np.inf) == draw(logits, list(history), asked)
        assert token >= forbidden
        assert margin >= 0
        assert np.array_equal(logits, before)
        for control in asked.controls:
            found = control.apply(logits, history)
            assert found.dtype == np.float32
            assert not np.isnan(found).any()
            assert not np.isfinite(found[:forbidden]).any()
        history.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_key_and_seed_both_decide(kind):
    texts = [written(mark_of(kind, key), seed, 20) for key in "ab" for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 4


def test_seeds_of_one_key_start_at_every_element():
    mark = mark_of("exponential", settings=["length=7"])
    assert {mark.element(Request((1,), 5, 1.0, seed), 3) for seed in range(100)} == set(range(7))


def test_the_exponential_draw_is_its_definition():
    mark = mark_of("exponential")
    asked = mark.mark(Request((1, 2), 20, 1.0, 5))
    for length in range(2, 20):
        logits = row(length)
        element = mark.element(asked, length)
        p = np.exp(logits) / np.exp(logits).sum()
        u = np.exp(-np.exp(-gumbel(mark.seed, element, np.arange(SIZE))))
        assert draw(logits, [0] * length, asked)[0] == np.argmin(-np.log(u) / p)


def test_the_inverse_draw_is_its_definition():
    """Its best score says how far the number is from where another token comes."""
    mark = mark_of("inverse")
    asked = mark.mark(Request((1, 2), 20, 1.0, 5))
    order = None
    for length in range(2, 20):
        logits = row(length)
        p = np.exp(logits.astype(np.float64))
        p /= p.sum()
        token, margin = draw(logits, [0] * length, asked, want_margin=True)
        scores = asked.controls[0].apply(logits, [0] * length)
        order = asked.controls[0]._order if order is None else order
        low = np.concatenate([[0.0], np.cumsum(p[order])])
        place = int(np.flatnonzero(order == token)[0])
        u = gumbel(mark.seed, mark.element(asked, length), np.zeros(1, np.int64))[0]
        u = np.exp(-np.exp(-u))
        assert low[place] <= u < low[place + 1]
        nearest = min(u - low[place] if place else 1, low[place + 1] - u if u < low[-2] else 1)
        assert margin == pytest.approx(2 * nearest, rel=1e-3)
        assert scores.max() == scores[token] == 0


def test_synthid_is_a_tournament():
    """The distribution form against every bracket of two layers, weighed by its probability."""
    from itertools import product

    mark = mark_of("synthid", settings=["layers=2", "context=1"])
    asked = mark.mark(Request((1, 2), 9, 1.0))
    logits = row(1, 5)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    found = bits(context_stream(mark.seed, [2]), np.arange(5))
    first, second = (found & np.uint64(1)).astype(int), (found >> np.uint64(1) & np.uint64(1))
    expected = np.zeros(5)

    def won(g, a, b):
        return [(a, 0.5), (b, 0.5)] if g[a] == g[b] else [(a if g[a] else b, 1.0)]

    for a, b, c, d in product(range(5), repeat=4):
        for x, cx in won(first, a, b):
            for y, cy in won(first, c, d):
                for z, cz in won(second, x, y):
                    expected[z] += p[a] * p[b] * p[c] * p[d] * cx * cy * cz
    scores = asked.controls[0].apply(logits, [1, 2])
    assert np.exp(scores) == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 100), st.integers(1, 64), st.floats(0.1, 60))
def test_the_native_tournament_is_the_reference(seed, size, layers, spread):
    logits = row(seed, size, spread)
    logits[1::3] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    found = _native.tournament(p, seed, layers)
    assert found.tobytes() == tournament(p, seed, layers).tobytes()
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert not found[1::3].any()


def test_synthid_lets_the_walk_say_that_nothing_is_allowed():
    asked = mark_of("synthid").mark(Request((1, 2, 3, 4), 5, 1.0))
    with pytest.raises(RequestError, match="no token"):
        draw(np.full(SIZE, -np.inf, np.float32), [1, 2, 3, 4], asked)


def test_synthid_leaves_repeated_contexts_alone():
    control = mark_of("synthid").mark(Request((9,) * 6, 30, 1.0)).controls[0]
    logits, history = row(1), [9] * 6
    assert not np.array_equal(control.apply(logits, history), logits)
    history += [1, 2, 3, 4, 5]
    assert not np.array_equal(control.apply(logits, history), logits)
    history += [0, 2, 3, 4, 5]
    assert np.array_equal(control.apply(logits, history), logits)
    assert np.array_equal(control.apply(logits, [9, 9]), logits), "no context yet"


def test_green_tokens_are_as_many_as_gamma_says_and_the_detectors():
    mark = mark_of("green", settings=["gamma=0.3", "context=2"])
    control = mark.mark(Request((1,), 5)).controls[0]
    size, shares = 4000, []
    for token in range(10):
        logits = np.zeros(size, np.float32)
        found = control.apply(logits, [5, 7, token])
        assert set(found.tolist()) == {0.0, 2.0}
        shares.append((found > 0).mean())
        green, red = int(found.argmax()), int(found.argmin())
        assert mark.detect([7, token, green]).p == pytest.approx(0.3)
        assert mark.detect([7, token, red]).p == 1.0
    assert abs(np.mean(shares) - 0.3) < 0.01
    assert np.array_equal(control.apply(logits, [5]), logits), "no context yet"


def test_green_lists_take_little_memory_and_are_the_same_again():
    mark = mark_of("green", settings=["gamma=0.5"])
    control, logits = mark.mark(Request((1,), 5)).controls[0], np.zeros(200_000, np.float32)
    first = control.apply(logits, [0])
    held = []
    for token in range(1, 60):
        control.apply(logits, [token])
        held.append(sum(each.nbytes for each in control._lists.values()))
    assert 2**19 < max(held) <= 2**20
    assert np.array_equal(control.apply(logits, [0]), first)


# ---------------------------------------------------------------------------- detecting


@given(st.integers(0, 2**63), st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
def test_arrays_of_streams_are_streams(seed, numbers):
    array = np.array(numbers)
    found = streams(np.array([seed], np.uint64), array)
    assert found.tolist() == [stream(seed, number) for number in numbers]
    noise = perturbation(stream(seed, numbers[0]), array)
    assert np.array_equal(noise, gumbel(seed, numbers[0], array))
    assert context_streams(seed, array[None])[0] == context_stream(seed, numbers)


def test_windows():
    assert windows([1, 2, 3], 2).tolist() == [[1, 2], [2, 3]]
    assert windows([1], 2).shape == (0, 2)


@given(st.integers(1, 60), st.floats(0.05, 0.95), st.data())
def test_the_tail_is_binomial(of, prob, data):
    count = data.draw(st.integers(0, of))
    ways = [comb(of, k) * prob**k * (1 - prob) ** (of - k) for k in range(count, of + 1)]
    assert tail(count, of, prob) == pytest.approx(min(sum(ways), 1.0), rel=1e-9)


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(3, 8))
@settings(max_examples=40, deadline=None)
def test_alignment_is_its_definition(seed, size, length):
    """Against every way to walk text and key, by recursion from each start."""
    random = np.random.default_rng(seed)
    rows = random.normal(-0.3, 1, (3, 2, length)).astype(np.float32)
    order = random.integers(0, 3, size)
    gap = 0.4

    def after(i, j, key):
        """The best continuation once token i stands beside element j."""
        best = 0.0
        for lone in range(size - i - 1):  # tokens that stand alone
            for skipped in range(3):
                token, element = i + 1 + lone, (j + 1 + skipped) % length
                earned = rows[order[token], key, element] - gap * (lone + skipped)
                best = max(best, earned + after(token, element, key))
        return best

    if size > 5:
        order = order[:5]
        size = 5
    expected = [
        max(
            0.0,
            *(
                rows[order[i], key, j] + after(i, j, key)
                for i in range(size)
                for j in range(length)
            ),
        )
        for key in range(2)
    ]
    assert best_alignment(rows, order, gap) == pytest.approx(expected, abs=1e-5)


def test_p_values_by_resampling():
    def score(seeds):
        return (seeds % np.uint64(1000)).astype(np.float32)

    assert resampled(score, 999_999, 256, 99)[1] <= 0.02
    found, p = resampled(score, 5000, 256, 999)
    assert (found, p) == (0.0, 1.0), "every key is as good: ten of ten"
    middle = np.mean([resampled(score, seed, 256, 999)[1] for seed in range(0, 1000, 50)])
    assert 0.4 < middle < 0.65


@pytest.mark.parametrize("kind", KINDS)
def test_marked_texts_are_found_and_others_are_not(kind):
    """Random logits of 3.4 nats, 50 tokens; false positives over keys, a bound of 5 deviations."""
    random = np.random.default_rng(3)
    marks = [mark_of(kind, f"key {number}") for number in range(8)]
    texts = [written(mark, seed) for seed, mark in enumerate(marks)]
    found = [m.detect(t, 99).p <= 0.01 for m, t in zip(marks, texts, strict=True)]
    assert np.mean(found) == 1.0
    edits = [damaged(text, 0.2, random) for text in texts]
    found = [m.detect(t, 99).p <= 0.01 for m, t in zip(marks, edits, strict=True)]
    assert np.mean(found) >= (0.8 if kind == "exponential" else 0.3)
    unmarked = [written(None, seed) for seed in range(20)]
    ps = [mark_of(kind, f"other {i}").detect(unmarked[i % 20], 99).p for i in range(150)]
    assert np.mean(np.array(ps) <= 0.05) <= 0.05 + 5 * np.sqrt(0.05 * 0.95 / 150)
    assert np.mean(np.array(ps) <= 0.5) >= 0.25
    assert marks[0].detect(texts[1], 99).p > 0.01, "another key"


def test_a_marked_passage_is_found_in_the_middle_of_a_text():
    mark = mark_of("exponential")
    around = np.random.default_rng(0).integers(0, SIZE, 100).tolist()
    inside = around[:60] + written(mark, 1)[10:] + around[60:]
    assert mark.detect(inside, 199).p <= 0.01


def test_detection_says_the_same_twice():
    mark = mark_of("inverse")
    text = written(None, 5)
    assert mark.detect(text, 199) == mark.detect(list(text), 199)


# ------------------------------------------------------------------------------- command


def test_the_command_finds_what_generate_wrote(paceline, tmp_path):
    mark = "key=river,kind=exponential"
    words = ("Once upon a time", "--temperature", 1.0, "--max-new-tokens", 60, "--json")
    done = paceline("generate", *words, "--watermark", mark, "--check")
    assert done.json["check"]["identical"]
    assert done.json["watermark"] == "exponential"
    assert "river" not in done.out + done.err
    file = tmp_path / "text.txt"
    file.write_text(done.json["text"])
    found = paceline("watermark", "detect", file, "--watermark", mark, "--resamples", 199, "--json")
    assert found.code == 0
    assert found.json["p"] <= 0.01
    assert found.json["kind"] == "exponential"
    other = paceline("watermark", "detect", "-", "--watermark", "key=sea", stdin=done.json["text"])
    assert other.out.startswith("not shown to be marked")
    said = paceline("watermark", "detect", file, "--watermark", mark, "--resamples", 99)
    assert said.out.startswith("marked (p <= 0.01): p is at most 0.01, alignment")


def test_proof_covers_watermarks(paceline, prompts):
    words = ("--drafters", "recycle,lookup", "--max-new-tokens", 12, "--limit", 2)
    from tests.conftest import shared

    model = shared("models", "stories260K")
    for kind in KINDS:
        more = ("--temperatures", "1.0", "--watermark", f"key=a,kind={kind}", "--json")
        done = paceline("prove", model, "--prompts", prompts, *words, *more)
        assert (done.code, done.json["bugs"]) == (0, 0)
        assert done.json["settings"]["watermark"] == kind


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("generate", "a", "--watermark", "kind=green"), "needs a key"),
        (("generate", "a", "--watermark", "key=a", "--temperature", 0), "temperature 0"),
        (("chat", "--watermark", "key=a,kind=no"), "unknown watermark"),
        (("watermark", "detect", "missing.txt", "--watermark", "key=a"), "missing.txt"),
        (("watermark", "detect", "missing.txt"), "--watermark"),
        (("watermark",), "Missing command"),
    ],
)
def test_the_command_refuses_in_one_sentence(paceline, words, said):
    done = paceline(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_a_text_that_is_none(paceline, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(b"\xff\xfe")
    done = paceline("watermark", "detect", file, "--watermark", "key=a", "--json")
    assert done.code == 2
    assert "not UTF-8" in json.loads(done.out)["error"]
    file.write_text("")
    done = paceline("watermark", "detect", file, "--watermark", "key=a")
    assert "give more text" in done.err

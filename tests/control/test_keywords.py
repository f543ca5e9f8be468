"""Required keywords: always there, and the HMM's chances are those of counting everything."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.base import bind
from paceline.control.keywords import Keywords, _Deadline, _Guided
from paceline.control.lexical.hmm import Hmm, read_hmm, write_hmm
from paceline.control.lexical.keyword_automaton import FAR, KeywordAutomaton
from paceline.core import Request, TokenTree
from paceline.errors import MethodError, ModelError, PacelineError, RequestError
from paceline.models.tokenizer import open_tokenizer
from paceline.models.vocabulary import Vocabulary
from tests.conftest import shared


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="recycle:warm=false", engine="native", budget=6)


def random_hmm(generator, states, tokens):
    rows = (generator.gamma(0.5, size=shape) + 1e-3 for shape in [states, (states, states)])
    initial, transition = (row / row.sum(-1, keepdims=True) for row in rows)
    emission = generator.gamma(0.5, size=(states, tokens)) + 1e-3
    return Hmm(initial, transition, emission / emission.sum(1, keepdims=True))


@pytest.fixture(scope="module")
def hmm_file(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("hmm") / "random.safetensors"
    hmm = random_hmm(np.random.default_rng(0), 5, lm.vocabulary.size)
    write_hmm(path, hmm, lm.tokenizer)
    return str(path)


def has(text, words, ordered):
    """Whether a text has the words, said another way."""
    place = 0
    for word in words:
        found = re.compile("|".join(map(pattern, word.split("|")))).search(text, place)
        if not found:
            return False
        place = found.end() if ordered else 0
    return True


def pattern(way):
    before = r"(?<![^\W_])" if way[0].isalnum() else ""
    behind = r"(?![^\W_])" if way[-1].isalnum() else ""
    return f"{before}(?i:{re.escape(way[0])}){re.escape(way[1:])}{behind}"


PIECES = [b"a", b"b", b" ", b"ab", b" a", b"ba "]
WANTED = st.lists(st.sampled_from(["a", "b", "ab", "aba", "b a", "a|bb"]), min_size=1, max_size=3)


@given(WANTED, st.booleans(), st.lists(st.integers(0, 5), max_size=7))
@settings(max_examples=200, deadline=None)
def test_the_spotter_finds_whole_words(words, ordered, tokens):
    ways = [tuple(way.encode() for way in word.split("|")) for word in words]
    spotter = KeywordAutomaton(ways, ordered, PIECES, ())
    state = spotter.start(b"")
    for token in tokens:
        state = spotter.next[state, spotter.kind[token]]
    text = b"".join(PIECES[token] for token in tokens).decode()
    expected = has(text, words, ordered)
    assert spotter.ends[state] == expected
    assert (state == 0) <= expected
    if not expected and spotter.steps[state] <= 3:  # no shorter way, and this one
        need = spotter.steps[state]
        for size in range(need + 1):
            tails = itertools.product(range(len(PIECES)), repeat=size)
            texts = (text + b"".join(PIECES[t] for t in tail).decode() for tail in tails)
            assert any(has(each, words, ordered) for each in texts) == (size == need)


def test_a_keyword_that_the_prompt_began_does_not_count():
    spotter = KeywordAutomaton([(b"a",)], False, PIECES, ())
    for before, expected in ((b"", True), (b"b", False), (b"b ", True), ("é".encode(), False)):
        state = spotter.next[spotter.start(before), spotter.kind[0]]
        assert spotter.ends[state] == expected


@given(st.integers(0, 1 << 30), WANTED, st.booleans(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_chances_are_those_of_counting_every_text(seed, words, ordered, length):
    generator = np.random.default_rng(seed)
    tokens = len(PIECES) + 1  # the last one ends the text
    hmm = random_hmm(generator, 3, tokens)
    prompt = tuple(generator.integers(0, len(PIECES), 2).tolist())
    request = Request(prompt, length, stop_tokens=frozenset({tokens - 1}))
    ways = [tuple(way.encode() for way in word.split("|")) for word in words]
    spotter = KeywordAutomaton(ways, ordered, [*PIECES, b""], request.stop_tokens)
    start = spotter.start(PIECES[prompt[-1]])
    if spotter.steps[start] > length:
        return
    deadline = _Deadline(ways, spotter, start, request)
    control = _Guided(deadline, hmm, hmm.outlook(spotter, length), request)
    state = start
    history = list(prompt)
    hidden = hmm.initial
    for token in history:
        hidden = (hidden * hmm.emission[:, token]) @ hmm.transition
        hidden /= hidden.sum()
    mass, total = np.zeros(tokens), np.zeros(tokens)
    for text in every_text(length, tokens):
        prob, after = hidden, state
        for place, token in enumerate(text):
            prob = prob * hmm.emission[:, token]
            if token == tokens - 1:
                break
            after = spotter.next[after, spotter.kind[token]]
            if place + 1 < len(text):
                prob = prob @ hmm.transition
        total[text[0]] += prob.sum()
        mass[text[0]] += prob.sum() * spotter.ends[after]
    logits = generator.normal(size=tokens).astype("f4")
    edited = control.apply(logits, history)
    np.testing.assert_allclose(np.exp(edited - logits), mass / total, rtol=1e-4, atol=1e-12)


def every_text(length, tokens):
    """All texts of `length` tokens, or shorter where the last token ends them."""
    for text in itertools.product(range(tokens), repeat=length):
        stop = text.index(tokens - 1) if tokens - 1 in text else length
        if all(token == tokens - 1 for token in text[stop:]):
            yield text[: stop + 1]


CASES = [
    (["dog", "park"], False, 14),
    (["ice cream", "Lily", "umbrella"], True, 24),
    (["x1", "was|is", "C++", "Nö"], False, 30),
]


@pytest.mark.parametrize(("words", "ordered", "length"), CASES)
@pytest.mark.parametrize("guided", [False, True])
def test_every_output_has_its_keywords(lm, hmm_file, words, ordered, length, guided):
    control = Keywords.of(words, ordered, hmm_file if guided else "")
    for seed in range(4):
        output = lm.generate(
            "Once upon a time there was",
            keywords=control,
            max_new_tokens=length,
            temperature=1.5,
            seed=seed,
            controls={},
        )
        assert has(output.text, words, ordered), output.text
        assert output.finish in ("stop", "length")


def test_the_end_of_the_context_is_a_deadline_too(lm):
    prompt = lm.tokenizer.encode("a day " * 600)[: lm.engine.config.context - 20]
    output = lm.generate(prompt, keywords=["umbrella"], max_new_tokens=500, temperature=1.0)
    assert has(output.text, ["umbrella"], False)
    assert len(output.tokens) <= 20


def test_bytes_that_are_no_character_spoil_no_keyword():
    tokenizer = open_tokenizer(shared("models", "stories260K"))
    vocabulary = Vocabulary(len(tokenizer), tokenizer)
    request = Request((1,), 40, stop_tokens=frozenset({2}))
    request = bind([Keywords("dog;Nö")], request, vocabulary)
    likely = sorted(tokenizer.byte_tokens)
    for seed in range(8):
        generator, history = np.random.default_rng(seed), list(request.prompt)
        while len(history) <= 40 and history[-1] != 2:
            logits = generator.normal(size=vocabulary.size).astype("f4")
            logits[likely] += 4
            logits[[likely[0xE3], likely[ord("d")], likely[ord(" ")]]] += 3
            history.append(int(request.controls[0].apply(logits, history).argmax()))
        assert has(tokenizer.decode(history[1:]), ["dog", "Nö"], False)


def test_a_tight_length_is_enough(lm):
    request = lm.request("Once", keywords=["umbrella", "dog"])
    need = int(request.controls[-1].automaton.steps[request.controls[-1]._states[0]])
    for temperature in (0.0, 2.0):
        output = lm.generate(
            "Once", keywords="umbrella;dog", max_new_tokens=need, temperature=temperature
        )
        assert has(output.text, ["umbrella", "dog"], False)
    with pytest.raises(RequestError, match=f"need {need} tokens"):
        lm.request("Once", keywords="umbrella;dog", max_new_tokens=need - 1)


@given(st.lists(st.integers(0, 511), min_size=1, max_size=8), st.integers(0, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_drafts_are_dropped_where_tokens_are_forbidden(lm, hmm_file, tokens, past, guided):
    control = Keywords.of(["dog", "sun"], hmm=hmm_file if guided else "")
    request = lm.request("Once upon", keywords=control, max_new_tokens=12, temperature=0.0)
    (bound,), history = request.controls, list(request.prompt)
    zeros = np.zeros(lm.vocabulary.size, "f4")
    for token in [lm.vocabulary.inside(b" m")[0]] * past:
        if np.isfinite(bound.apply(zeros, history)[token]):
            history.append(token)
    kept = bound.allows(history, TokenTree.chain([history[-1], *tokens]))
    for place, token in enumerate(tokens):
        if len(history) - len(request.prompt) >= 12:
            break
        assert kept[place + 1] == np.isfinite(bound.apply(zeros, history)[token])
        if not kept[place + 1] or token in request.stop_tokens:
            break
        history.append(token)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "needs a word"),
        ('"dog;park', r"not a JSON string|words separated"),
        ("dog;;park", "is empty"),
        ("dog|", "is empty"),
        ('"\\ud800"', "half a character"),
    ],
)
def test_bad_keywords(words, said):
    with pytest.raises(MethodError, match=said):
        Keywords(words)


@given(st.text('ab;"|\\, ', max_size=12))
def test_any_text_is_understood_or_refused(text):
    try:
        ways = Keywords(text).ways()
    except PacelineError:
        return
    assert all(way and way == way.strip() for keyword in ways for way in keyword)


def test_what_cannot_be_is_refused(lm, hmm_file, tmp_path):
    with pytest.raises(RequestError, match="stop strings"):
        lm.request("x", keywords="dog", stop=["."])
    with pytest.raises(RequestError, match="breaks the rules of letters"):
        lm.request("x", keywords=["tree", "dog"], controls="letters=e")
    with pytest.raises(RequestError, match="too many keywords to track"):
        lm.request("x", keywords=[f"word{i}" for i in range(30)])
    lm.request("x", keywords=Keywords.of([f"w{i}" for i in range(30)], ordered=True))
    many = Keywords.of([f"word{i}" for i in range(5)], hmm=hmm_file)
    with pytest.raises(RequestError, match="expected at most 512"):
        bind([many], Request((88,), 100_000, stop_tokens=frozenset({0})), lm.vocabulary)
    with pytest.raises(ModelError, match="cannot read the HMM"):
        lm.request("x", keywords=Keywords("dog", hmm=str(tmp_path / "none")))
    with pytest.raises(ModelError, match="not a file"):
        lm.request("x", keywords=Keywords("dog", hmm=str(tmp_path)))
    (tmp_path / "bad").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError):
        lm.request("x", keywords=Keywords("dog", hmm=str(tmp_path / "bad")))
    small = random_hmm(np.random.default_rng(0), 2, 17)
    write_hmm(tmp_path / "small", small, lm.tokenizer)
    with pytest.raises(ModelError, match="another vocabulary"):
        lm.request("x", keywords=Keywords("dog", hmm=str(tmp_path / "small")))
    broken = Hmm(small.initial * 2, small.transition, small.emission)
    write_hmm(tmp_path / "broken", broken, lm.tokenizer)
    with pytest.raises(ModelError, match="is not an HMM"):
        lm.request("x", keywords=Keywords("dog", hmm=str(tmp_path / "broken")))


def test_what_no_token_can_write_is_refused():
    spotter = KeywordAutomaton([(b"z",)], False, PIECES, ())
    assert spotter.steps[spotter.start(b"")] >= FAR


def test_an_hmm_comes_back_from_its_file(lm, hmm_file):
    hmm = random_hmm(np.random.default_rng(0), 5, lm.vocabulary.size)
    found = read_hmm(hmm_file, lm.tokenizer, lm.vocabulary.size)
    for name in ("initial", "transition", "emission"):
        np.testing.assert_allclose(getattr(found, name), getattr(hmm, name), rtol=1e-5)

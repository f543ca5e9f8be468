"""The masks behind guesses: what is kept must be what would be made anew."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.base import paths as paths_of
from paceline.control.capabilities import MasksTokens
from paceline.control.grammar import Grammar
from paceline.control.structured.matcher import Matcher, refusal
from paceline.core import TokenTree
from paceline.errors import RequestError
from tests.conftest import shared

pytest.importorskip("llguidance")

CARD = Grammar.schema(
    {
        "properties": {"suit": {"enum": ["hearts", "spades"]}, "text": {"maxLength": 4}},
        "required": ["suit", "text"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), drafter="blend:warm=false", budget=8)


def matcher(lm, grammar=CARD):
    request = lm.request("Once", grammar=grammar, controls={}, temperature=0)
    found = request.controls[-1]
    assert isinstance(found, Matcher)
    assert isinstance(found, MasksTokens)
    return found, list(request.prompt)


def tokens_of(bits):
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def drawable(found, history, size):
    return np.flatnonzero(np.isfinite(found.apply(np.zeros(size, np.float32), history))).tolist()


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_masks_behind_guesses_are_those_of_a_matcher_that_was_never_asked(lm, data):
    used, prompt = matcher(lm)
    size, stops = lm.vocabulary.size, lm.model.defaults.stop_tokens
    history = list(prompt)
    for _ in range(3):
        masks = used.masks(history)
        paths, answers = [()], {}
        for _ in range(6):
            path = data.draw(st.sampled_from(paths))
            answers[path] = tokens_of(masks(path))
            going = [t for t in answers[path] if t not in stops]
            if going:
                paths.append((*path, data.draw(st.sampled_from(going))))
        for path, got in answers.items():
            fresh, _ = matcher(lm)
            assert drawable(fresh, [*history, *path], size) == got
            assert drawable(used, [*history, *path], size) == got
        tree = TokenTree.chain([history[-1], *max(paths, key=len)])
        known = used.known(history, tree)
        assert {n: tokens_of(bits) for n, bits in known.items()} == {
            n: answers[path] for n, path in enumerate(paths_of(tree)) if path in answers
        }
        step = data.draw(st.sampled_from(paths))
        assert used.known([*history, 77], tree) == {}
        history += step


def test_nothing_follows_a_stop_token_or_what_is_forbidden(lm):
    found, prompt = matcher(lm, Grammar("ab?"))
    stop = next(iter(lm.model.defaults.stop_tokens))
    [a], [b] = lm.vocabulary.inside(b"a"), lm.vocabulary.inside(b"b")
    masks = found.masks(prompt)
    bs = [token for token, piece in enumerate(lm.vocabulary.pieces) if piece == b"b"]
    assert tokens_of(masks([a])) == sorted([*bs, stop])
    assert tokens_of(masks([a, stop])) == []
    assert tokens_of(masks([b])) == []
    assert tokens_of(masks([b, a])) == []
    logits = np.zeros(lm.vocabulary.size, np.float32)
    history = [*prompt, a, stop]  # where a walk may look
    assert found.apply(logits, history) is logits
    assert found.masks(history)([]) is None


def test_more_masks_than_have_a_place_stay_what_they_are(lm):
    found, prompt = matcher(lm, Grammar("[a-z]{200}"))
    size, masks, path = lm.vocabulary.size, found.masks(prompt), []
    [token] = lm.vocabulary.inside(b"a")
    kept = []
    for _ in range(150):
        kept.append(masks(list(path)))
        path.append(token)
    fresh, _ = matcher(lm, Grammar("[a-z]{200}"))
    for n, bits in enumerate(kept):
        assert tokens_of(bits) == drawable(fresh, [*prompt, *path[:n]], size)


class _Weak:
    """A matcher that cannot say what follows some texts."""

    def __init__(self, inner, weak, taken=()):
        self._inner, self._weak, self._taken, self._broken = inner, weak, list(taken), False

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def deep_copy(self):
        return _Weak(self._inner.deep_copy(), self._weak, self._taken)

    def try_consume_tokens(self, tokens):
        count = self._inner.try_consume_tokens(tokens)
        self._taken += tokens[:count]
        return count

    def rollback(self, count):
        assert not self._broken
        del self._taken[len(self._taken) - count :]
        self._inner.rollback(count)

    def unsafe_compute_mask_ptr(self, *place):
        self._broken = self._taken in self._weak
        self._inner.unsafe_compute_mask_ptr(*place)

    def is_error(self):
        return self._broken

    def get_error(self):
        return "too complex"


def test_what_breaks_behind_a_guess_does_not_break_the_text(lm):
    request = lm.request("Once", grammar=Grammar("[ab]+"), controls={}, temperature=0)
    [a], [b] = lm.vocabulary.inside(b"a"), lm.vocabulary.inside(b"b")
    whole, prompt = matcher(lm, Grammar("[ab]+"))
    start = _Weak(whole._beginning, [[a, b]])
    weak = Matcher(start, request, lm.vocabulary, lambda: start)
    masks, sound = weak.masks([*prompt, a]), whole.masks([*prompt, a])
    assert masks([b]) is None
    for path in ([a], [b, a], []):
        assert tokens_of(masks(path)) == tokens_of(sound(path))
    tree = TokenTree.chain([a, b, b])
    assert weak.allows([*prompt, a], tree).tolist() == [True, True, False]
    with pytest.raises(RequestError, match="too complex"):
        weak.apply(np.zeros(lm.vocabulary.size, np.float32), [*prompt, a, b])


def test_a_matcher_that_others_wore_out_is_made_anew(lm):
    request = lm.request("Once", grammar=Grammar("[ab]+"), controls={}, temperature=0)
    [a], [b] = lm.vocabulary.inside(b"a"), lm.vocabulary.inside(b"b")
    whole, prompt = matcher(lm, Grammar("[ab]+"))
    worn = _Weak(whole._beginning, [[], [a], [a, b]])
    weak = Matcher(worn, request, lm.vocabulary, lambda: whole._beginning)
    zeros = np.zeros(lm.vocabulary.size, np.float32)
    for text in ([], [a], [a, b]):
        expected = whole.apply(zeros, [*prompt, *text])
        np.testing.assert_array_equal(weak.apply(zeros, [*prompt, *text]), expected)


class _Counting(_Weak):
    """Counts the questions for forced tokens, over all copies."""

    asked = 0

    def deep_copy(self):
        return type(self)(self._inner.deep_copy(), self._weak, self._taken)

    def compute_ff_tokens(self):
        type(self).asked += 1
        return self._inner.compute_ff_tokens()


def test_only_what_leaves_no_choice_is_asked_for_forced_tokens(lm):
    request = lm.request("Once", grammar=Grammar("[ab]c[ab]"), controls={}, temperature=0)
    [a], [b], [c] = (lm.vocabulary.inside(letter) for letter in (b"a", b"b", b"c"))
    whole, prompt = matcher(lm, Grammar("[ab]c[ab]"))
    found = Matcher(_Counting(whole._beginning, []), request, lm.vocabulary, lambda: None)
    _Counting.asked = 0
    masks = found.masks(prompt)
    assert set(tokens_of(masks([]))) >= {a, b}
    assert found.forced(prompt) == []
    assert _Counting.asked == 0, "the mask has a choice"
    assert tokens_of(masks([a])) == [c]
    tree = TokenTree.chain([prompt[-1], a])
    kept, chains = found.extensions(prompt, tree)
    assert kept.tolist() == [True, True]
    assert chains == {1: [c]}
    assert _Counting.asked == 1
    assert found.known(prompt, tree).keys() == {0, 1}
    assert found.known([*prompt, a], tree) == {}


class _WornOut(_Weak):
    """Its second copy has no states left, and takes no tokens."""

    copies = 0

    def deep_copy(self):
        self.copies += 1
        copy = _Weak(self._inner.deep_copy(), self._weak, self._taken)
        if self.copies == 2:
            copy.try_consume_tokens = lambda tokens: 0
        return copy


@pytest.mark.parametrize("worn", [False, True])
def test_a_grammar_is_compiled_again_only_where_its_copies_are_worn_out(lm, worn):
    request = lm.request("Once", grammar=Grammar("[ab]+"), controls={}, temperature=0)
    [a], [b] = lm.vocabulary.inside(b"a"), lm.vocabulary.inside(b"b")
    whole, prompt = matcher(lm, Grammar("[ab]+"))
    start = _Weak(whole._beginning, [[a, b]])
    again = [_WornOut(whole._beginning, [[a, b]]) if worn else start, whole._beginning]
    compiled = []

    def recompile():
        compiled.append(again[len(compiled)])
        return compiled[-1]

    weak = Matcher(start, request, lm.vocabulary, recompile)
    masks = weak.masks([*prompt, a])
    assert masks([b]) is None, "also when it is compiled again"
    assert len(compiled) == 1 + worn, "and back to the base by a copy, where one can go there"
    zeros = np.zeros(lm.vocabulary.size, np.float32)
    expected = whole.apply(zeros, [*prompt, a])
    np.testing.assert_array_equal(weak.apply(zeros, [*prompt, a]), expected)
    assert len(compiled) == 1 + worn


def test_the_space_after_the_prompt_is_part_of_the_text():
    lm = LM(shared("models", "stories260K"))
    output = lm.generate("Once upon", controls=[Grammar(r" a [a-z]{5}\.")], temperature=0.0)
    assert re.fullmatch(r" a [a-z]{5}\.", output.text)
    with pytest.raises(RequestError, match="allow no token"):
        lm.generate("", controls=[Grammar(r" a [a-z]{5}\.")], temperature=0.0)


def test_drafters_learn_from_what_is_allowed(lm, monkeypatch):
    seen = []
    observe = type(lm.drafter).observe
    monkeypatch.setattr(
        type(lm.drafter), "observe", lambda self, step: (seen.append(step), observe(self, step))
    )
    request = lm.request("Once", grammar=CARD, controls={}, temperature=1.0, max_new_tokens=30)
    lm.stream(request).run()
    fresh, prompt = matcher(lm)
    passes = [step for step in seen if len(step.context) >= len(prompt)]
    stops = lm.model.defaults.stop_tokens
    nodes = 0
    for step in passes:
        for node, path in enumerate(paths_of(step.tree)[:-1]):
            if not stops.isdisjoint(path):
                continue
            allowed = drawable(fresh, [*step.context.tolist(), *path], lm.vocabulary.size)
            likely = step.top_tokens[node][step.top_probs[node] > 0].tolist()
            assert set(likely) <= set(allowed)
            nodes += 1
    assert nodes > len(passes)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("NoExtension: rest", "the grammar allows no text from here on"),
        ("too NoExtension", "the grammar cannot be used: too NoExtension"),
        ("one line", "the grammar cannot be used: one line"),
        (
            " first \n\n more\nerror: a \n error: b\nend<state>\nerror: c",
            "the grammar cannot be used: first error: b",
        ),
        ("error: a\nmore", "the grammar cannot be used: error: a"),
        ("x" * 400, f"the grammar cannot be used: {'x' * 300}"),
        ("", "the grammar cannot be used: "),
    ],
)
def test_an_error_is_one_sentence(error, sentence):
    assert refusal(SimpleNamespace(get_error=lambda: error)) == sentence


def test_a_token_outside_the_grammar_is_named_with_its_position(lm):
    found, prompt = matcher(lm, Grammar("abab"))
    [a], [b] = lm.vocabulary.inside(b"a"), lm.vocabulary.inside(b"b")
    zeros = np.zeros(lm.vocabulary.size, np.float32)
    for base in ([], [a], [a, b]):
        for text, at in (([a, a], 1), ([a, b, b], 2), ([a, b, a, a], 3)):
            found.masks([*prompt, *base])
            message = f"token {text[at]} at position {len(prompt) + at} is not in the grammar"
            with pytest.raises(RequestError, match=message):
                found.apply(zeros, [*prompt, *text])
    assert drawable(found, [*prompt, a, b, a], lm.vocabulary.size) == [b]


def test_the_forced_tokens_are_those_from_the_base_on(lm):
    found, prompt = matcher(lm, Grammar("ab(c|d)efg"))
    letters = {letter: lm.vocabulary.inside(letter.encode())[0] for letter in "abcdefg"}

    def ids(text):
        return [letters[letter] for letter in text]

    def said(tokens):
        return b"".join(lm.vocabulary.pieces[token] for token in tokens).decode()

    assert said(found.forced([*prompt, *ids("abc")])) == "efg"
    assert said(found.forced([*prompt, *ids("abce")])) == "fg"
    assert found.forced([*prompt, *ids("ab")]) == []
    stop = next(iter(lm.model.defaults.stop_tokens))
    assert found.forced([*prompt, *ids("abcefg"), stop]) == []
    tree = TokenTree(
        np.array([prompt[-1], *ids("abcdb")], np.int32),
        np.array([-1, 0, 1, 2, 2, 0], np.int32),
        np.ones(6, np.float32),
        np.zeros(6, np.int16),
    )
    kept, chains = found.extensions(prompt, tree)
    assert kept.tolist() == [True, True, True, True, True, False]
    assert {node: said(chain) for node, chain in chains.items()} == {3: "efg", 4: "efg"}
    assert found.allows([*prompt, *ids("ab")], TokenTree.chain([0, *ids("cea")])).tolist() == [
        True, True, True, False
    ]  # fmt: skip
    after = [*prompt, *ids("abcefg"), stop]
    kept, chains = found.extensions(after, TokenTree.chain([0, *ids("ab")]))
    assert (kept.tolist(), chains) == ([True, True, True], {})

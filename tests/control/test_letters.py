"""Rules for letters: whatever a model would say, an output that ended keeps them."""

import re
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.capabilities import FiltersDrafts
from paceline.control.letters import Letters, _Letters
from paceline.control.sampler_spec import SamplerSpec
from paceline.core import TokenTree
from paceline.errors import PacelineError, RequestError

RULES = [
    Letters(ban="eÉ"),
    Letters(only="stopnaeri", least=2),
    Letters(anagram="thequickbrownfox", most=5),
    Letters(every="ea", most=4),
    Letters(text="mwk", ban="q"),
    Letters(least=3, most=3),
]


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="plain", engine="native", budget=0)


def words(text):
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.casefold())


def keeps(rule, text):
    """The rule, said another way."""
    found = [re.sub("['’]", "", word) for word in words(text)]
    bans, only = set(rule.ban.casefold()), set(rule.only.casefold())
    return (
        not bans & set("".join(found))
        and all(not only or set(word) <= only for word in found)
        and all(not rule.anagram or Counter(word) <= Counter(rule.anagram) for word in found)
        and all(set(rule.every) <= set(word) for word in found)
        and set(rule.text) <= set("".join(found))
        and all(rule.least <= len(word) <= (rule.most or 99) for word in found)
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_text_that_ended_by_itself_keeps_the_rule(lm, rule):
    ended = 0
    for seed in range(6):
        request = lm.request("x", controls=[rule], max_new_tokens=60, temperature=1.0, seed=seed)
        (control, *_), history = request.controls, list(request.prompt)
        generator = np.random.default_rng(seed)
        stops = request.stop_tokens
        while len(history) < 300 and history[-1] not in stops:
            logits = generator.normal(0, 3, lm.vocabulary.size).astype("f4")
            logits[list(stops)] = 30 if len(history) > 30 else 0
            history.append(int(control.apply(logits, history).argmax()))
        assert history[-1] in stops
        pieces = [lm.vocabulary.pieces[token] for token in history[len(request.prompt) : -1]]
        text = b"".join(pieces).decode()
        assert keeps(rule, text), text
        ended += len(words(text)) > 1
    assert ended


@given(st.sampled_from(RULES), st.text("aenostxq É'é ’.1\n", max_size=12))
def test_the_automaton_accepts_what_keeps_the_rule(rule, text):
    automaton = _Letters(rule)
    state = automaton.start
    for character in text:
        state = None if state is None else automaton.step(state, character)
    assert (state is not None and automaton.whole(state)) == keeps(rule, text)


@given(st.sampled_from(RULES), st.lists(st.integers(3, 511), min_size=1, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_drafts_are_dropped_where_tokens_are_forbidden(lm, rule, tokens, data):
    request = lm.request("x", controls=[rule], temperature=0.0)
    (control,), history = request.controls, list(request.prompt)
    assert isinstance(control, FiltersDrafts)
    parents = [-1, *(data.draw(st.integers(0, i)) for i in range(len(tokens)))]
    nodes = np.array([history[-1], *tokens], np.int32)
    with suppress(ValueError):  # siblings may be the same
        tree = TokenTree(
            nodes,
            np.array(parents, np.int32),
            np.ones(len(nodes), np.float32),
            np.zeros(len(nodes), np.int16),
        )
        kept = control.allows(history, tree)
        assert kept[0]
        texts = [history]
        for node in range(1, len(nodes)):
            before = texts[parents[node]]
            texts.append([*before, int(nodes[node])])
            expected = kept[parents[node]] and np.isfinite(
                control.apply(np.zeros(lm.vocabulary.size, "f4"), before)[nodes[node]]
            )
            assert kept[node] == expected


def test_questions_may_come_in_any_order(lm):
    generator = np.random.default_rng(0)
    rule = Letters(anagram="aabbccddeeffgghhiijjkkllmmnnooppqqrrss", least=2)
    allowed = lm.request("x", controls=[rule]).controls[0]
    prompt, texts = list(lm.request("x").prompt), []
    zeros = np.zeros(lm.vocabulary.size, "f4")
    for _ in range(20):
        history = list(prompt)
        for _ in range(generator.integers(0, 8)):
            free = np.flatnonzero(np.isfinite(allowed.apply(zeros, history))[3:]) + 3
            history.append(int(generator.choice(free)))
        texts.append(history)
    for history in texts:
        fresh = lm.request("x", controls=[rule]).controls[0]
        assert (allowed.apply(zeros, history) == fresh.apply(zeros, history)).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "has no setting"),
        ({"ban": "e", "every": "e"}, "another rule forbids"),
        ({"only": "abc", "text": "d"}, "another rule forbids"),
        ({"only": "abc", "ban": "cab"}, "no letter"),
        ({"anagram": "cat", "least": 4}, "at least 4 letters and allow 3"),
        ({"every": "abc", "most": 2}, "at least 3 letters and allow 2"),
        ({"every": "ab", "text": "c", "most": 2}, "at least 3 letters and allow 2"),
        ({"least": 5, "most": 4}, "at least 5"),
        ({"most": -1}, "at least 0"),
        ({"ban": "a b"}, "letters only"),
    ],
)
def test_rules_that_contradict_are_refused(settings, said):
    with pytest.raises(PacelineError, match=said):
        Letters(**settings)


def test_what_cannot_be_kept_is_refused(lm):
    with pytest.raises(RequestError, match="stop strings"):
        lm.request("x", controls="letters.least=2", stop=["."])
    token = lm.vocabulary.beginning(b"e")[0]
    with pytest.raises(RequestError, match=r"no token|contradicts"):
        lm.generate("x", controls=f"letters=e,first_token={token}")
    assert SamplerSpec.parse("letters=e,letters.most=4").methods == (Letters(ban="e", most=4),)


def test_a_text_without_a_letter(lm):
    free = lm.generate("Once upon a time", temperature=1.0, controls={}, max_new_tokens=80).text
    text = lm.generate("Once upon a time", temperature=1.0, controls="letters=e").text
    assert "e" in free
    assert len(text) > 20
    assert "e" not in text.lower()

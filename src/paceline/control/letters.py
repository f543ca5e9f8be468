"""Letters of the text and of its words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

from paceline.control.base import ControlMethod, require
from paceline.control.lexical.char_automaton import CharAutomaton, State, TextControl
from paceline.core import Control, Exactness, Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

APOSTROPHES = "'\u2019"
ASCII = set(map(chr, range(128)))
_LONGEST = 64  # letters of a word, where no limit is given and something must be counted


@controls.register("letters", Exactness.EXACT)
@dataclass(frozen=True)
class Letters(ControlMethod):
    """Which letters the output is made of: lipograms, anagrams, words of some length.

    A word is a run of letters; an apostrophe inside joins it and is no letter. Case makes no
    difference, accents do: `e` is not `é`. The output alone is looked at, so that a word which the
    prompt began counts from where the output goes on. An output that ended by itself follows the
    rules to its last word; one that `max_new_tokens` cut says so (`length`) and may break off
    in a word.

    Attributes:
        ban: letters that never occur, as in `e`.
        only: letters that words are made of; empty allows all.
        anagram: words are made of some of these letters, each used as often as it is here.
        every: letters that every word has, all of them.
        text: letters that the whole text has, all of them, before it may end.
        least: letters of the shortest word. Default 0: any.
        most: letters of the longest word. Default 0: any.
    """

    ban: str = ""
    only: str = ""
    anagram: str = ""
    every: str = ""
    text: str = ""
    least: int = 0
    most: int = 0

    order = 33
    source = Source(
        authors="Roush et al.",
        title="Most Language Models Can Be Poets Too",
        arxiv="2306.15926",
        note="ours is exact",
    )
    catalogue = (30,)

    def __post_init__(self) -> None:
        if not any(getattr(self, field.name) for field in fields(self)):
            raise MethodError("letters asks for nothing; write e.g. letters=e or letters.most=4")
        for name in ("ban", "only", "anagram", "every", "text"):
            wrong = next((c for c in getattr(self, name) if not c.isalpha()), None)
            if wrong is not None:
                raise MethodError(f"letters.{name} has {wrong!r}, expected letters alone")
        require(self.least >= 0, "letters.least", self.least, "at least 0")
        require(self.most >= 0, "letters.most", self.most, "at least 0")
        self._check()

    def _check(self) -> None:
        """Refuse rules that no word can follow."""
        allowed, every, text = self._allowed(), _fold(self.every), _fold(self.text)
        for name, wanted in (("every", every), ("text", text)):
            lost = [c for c in wanted if c in _fold(self.ban) or (allowed and c not in allowed)]
            if lost:
                raise RequestError(f"letters.{name} wants {lost[0]!r}, which another rule forbids")
        if (self.only or self.anagram) and not allowed:
            raise RequestError("the rules of letters leave no letter to write with")
        most = self.most or _LONGEST
        if self.anagram:
            most = min(most, sum(_counts(self.anagram)[c] for c in allowed))
        # A letter of the text must find room beside those of every word.
        least = max(self.least, len({*every}) + any(c not in every for c in text))
        if least > most:
            raise RequestError(
                f"the rules of letters want words of at least {least} letters and allow {most}"
            )

    def _allowed(self) -> set[str]:
        """What words are made of; empty where every letter will do that is not banned."""
        sets = [set(_fold(given)) for given in (self.only, self.anagram) if given]
        return set.intersection(*sets) - set(_fold(self.ban)) if sets else set()

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """At the beginning of the output.

        Raises:
            RequestError: stop strings could end the text where it must not end.
        """
        if request.stop_strings and (self.every or self.text or self.least):
            raise RequestError(
                "letters cannot hold off stop strings where it sets every, text or least; "
                "leave one of them out"
            )
        return TextControl("letters", self, _Letters(self), request, vocabulary)


class _Word(NamedTuple):
    """Behind some text: of the running word its size and letters, and what the text has."""

    size: int = 0
    joined: bool = False  # an apostrophe came last
    used: tuple[int, ...] = ()
    missing: frozenset[str] = frozenset()
    text: frozenset[str] = frozenset()


class _Letters(CharAutomaton):
    def __init__(self, method: Letters) -> None:
        self._banned = frozenset(_fold(method.ban))
        self._only = method._allowed() if method.only or method.anagram else None
        self._counts = _counts(method.anagram) if method.anagram else Counter[str]()
        self._places = {letter: place for place, letter in enumerate(sorted(self._counts))}
        self._every = frozenset(_fold(method.every))
        self._least, self._most = method.least, method.most
        named = method.ban + method.only + method.anagram + method.every + method.text
        self.special = "".join({*named.lower(), *named.upper(), *APOSTROPHES} - ASCII)
        self._blank = (0,) * len(self._places)
        missing = frozenset(_fold(method.text))
        self.start = _Word(0, False, self._blank, self._every, missing)

    def step(self, state: State, character: str) -> State | None:
        word = cast(_Word, state)
        if not character.isalpha():
            if character in APOSTROPHES and word.size and not word.joined:
                return word._replace(joined=True)
            return self._ended(word) if self._fits(word) else None
        for letter in character.casefold():
            after = self._letter(word, letter)
            if after is None:
                return None
            word = after
        return word

    def _letter(self, word: _Word, letter: str) -> _Word | None:
        if letter in self._banned or (self._only is not None and letter not in self._only):
            return None
        used = word.used
        if self._places:
            place = self._places[letter]
            if used[place] == self._counts[letter]:
                return None
            used = (*used[:place], used[place] + 1, *used[place + 1 :])
        missing = word.missing - {letter}
        if self._most and word.size + 1 + len(missing) > self._most:
            return None
        # Beyond what is asked for a word's size makes no difference: there are few states.
        size = min(word.size + 1, max(self._least, self._most, 1))
        return _Word(size, False, used, missing, word.text - {letter})

    def _fits(self, word: _Word) -> bool:
        return not word.size or (word.size >= self._least and not word.missing)

    def _ended(self, word: _Word) -> _Word:
        return _Word(0, False, self._blank, self._every, word.text)

    def whole(self, state: State) -> bool:
        word = cast(_Word, state)
        return self._fits(word) and not word.text


def _fold(letters: str) -> str:
    return letters.casefold()


def _counts(letters: str) -> Counter[str]:
    return Counter(_fold(letters))

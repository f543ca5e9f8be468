"""Constraints on letters: lipograms, anagrams and word lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import NamedTuple, cast

from paceline.compatibility import Side, check
from paceline.control.base import ControlMethod, require
from paceline.control.lexical.char_automaton import CharAutomaton, State, TextControl
from paceline.core import Control, Exactness, Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

APOSTROPHES = "'\u2019"
ASCII = set(map(chr, range(128)))
_LONGEST = 64  # letters of a word where the settings give no limit


@controls.register("letters", Exactness.EXACT)
@dataclass(frozen=True)
class Letters(ControlMethod):
    """Constrain the letters of the output: lipograms, anagrams, word lengths.

    A word is a run of letters; an apostrophe inside joins it and is not a letter. Case is ignored,
    accents are not: `e` is not `é`. Only the output counts, so a word that the prompt began counts
    from where the output begins. An output that ends with a stop token follows the rules to its
    last word; one that `max_new_tokens` cuts finishes with `length` and may end within a word.

    Attributes:
        ban: letters that may not occur, as in `e`.
        only: letters that words may contain; empty allows all.
        anagram: letters that words are made of, each at most as often as given here.
        every: letters that each word must contain, all of them.
        text: letters that the whole text must contain, all of them, before it may end.
        least: minimum letters of a word. Default 0: any.
        most: maximum letters of a word. Default 0: any.
    """

    ban: str = ""
    only: str = ""
    anagram: str = ""
    every: str = ""
    text: str = ""
    least: int = 0
    most: int = 0

    order = 33
    examples = ("letters:ban=q,most=9",)
    source = Source(
        authors="Roush et al.",
        title="Most Language Models Can Be Poets Too",
        arxiv="2306.15926",
        note="ours is exact",
    )
    catalogue = (30,)
    missing = {30: "filters on meaning, and the writing studio"}

    def __post_init__(self) -> None:
        if not any(getattr(self, field.name) for field in fields(self)):
            raise MethodError("letters has no setting; write e.g. letters=e or letters.most=4")
        for name in ("ban", "only", "anagram", "every", "text"):
            wrong = next((c for c in getattr(self, name) if not c.isalpha()), None)
            if wrong is not None:
                raise MethodError(f"letters.{name} has {wrong!r}, expected letters only")
        require(self.least >= 0, "letters.least", self.least, "at least 0")
        require(self.most >= 0, "letters.most", self.most, "at least 0")
        self._check()

    def _check(self) -> None:
        """Refuse rules that no word can follow."""
        allowed, every, text = self._allowed(), _fold(self.every), _fold(self.text)
        for name, required in (("every", every), ("text", text)):
            lost = [c for c in required if c in _fold(self.ban) or (allowed and c not in allowed)]
            if lost:
                raise RequestError(
                    f"letters.{name} requires {lost[0]!r}, which another rule forbids"
                )
        if (self.only or self.anagram) and not allowed:
            raise RequestError("the rules of letters allow no letter")
        longest = self.most or _LONGEST
        if self.anagram:
            longest = min(longest, sum(_counts(self.anagram)[c] for c in allowed))
        # A required letter of the text must fit beside those of every word.
        shortest = max(self.least, len({*every}) + any(c not in every for c in text))
        if shortest > longest:
            raise RequestError(
                f"the rules of letters require words of at least {shortest} letters "
                f"and allow {longest}"
            )

    def _allowed(self) -> set[str]:
        """Return the letters that words may contain; empty if only `ban` restricts them."""
        sets = [set(_fold(given)) for given in (self.only, self.anagram) if given]
        return set.intersection(*sets) - set(_fold(self.ban)) if sets else set()

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for an output after the prompt.

        Raises:
            RequestError: stop strings could end the text where the rules forbid it.
        """
        if request.stop_strings and (self.every or self.text or self.least):
            control = "the control letters with every, text or least"
            check({Side.END_CONTROL: control, Side.STOP_STRINGS: "stop strings"})
        return TextControl("letters", self, _Letters(self), request, vocabulary)


class _Word(NamedTuple):
    """State after some text: the current word, and what it and the text still lack."""

    size: int = 0
    joined: bool = False  # the last character was an apostrophe
    used: tuple[int, ...] = ()
    missing: frozenset[str] = frozenset()
    text: frozenset[str] = frozenset()


class _Letters(CharAutomaton):
    def __init__(self, method: Letters) -> None:
        self._banned = frozenset(_fold(method.ban))
        self._only = method._allowed() if method.only or method.anagram else None
        self._counts = _counts(method.anagram) if method.anagram else Counter[str]()
        self._places = {letter: index for index, letter in enumerate(sorted(self._counts))}
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
            index = self._places[letter]
            if used[index] == self._counts[letter]:
                return None
            used = (*used[:index], used[index] + 1, *used[index + 1 :])
        missing = word.missing - {letter}
        if self._most and word.size + 1 + len(missing) > self._most:
            return None
        # Larger sizes than the rules ask for are one state, which keeps states few.
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

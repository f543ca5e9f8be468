"""Required keywords."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod, shared
from paceline.control.capabilities import RejectsText
from paceline.control.lexical.hmm import Doubles, Hmm, read_hmm
from paceline.control.lexical.keyword_automaton import FAR, Keyword, KeywordAutomaton
from paceline.core import Control, Exactness, Floats, Request, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_COMPILED = 16  # spotters kept for each model
_ITEM = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^;"]*)\s*(?:;|$)')
_LEAST = 1e-300  # of a chance that is not 0, to be told from one that is


@controls.register("keywords", Exactness.EXACT)
@dataclass(frozen=True)
class Keywords(ControlMethod):
    """Words that the output will have, each as a whole word, in any order or in theirs.

    The end is forbidden until all were there, and so is every token behind which the tokens that
    are left would not be enough for the rest: an output that uses up `max_new_tokens`, or what the
    model's context leaves of them, has them, too.

    That alone lets a model go on as if nothing was wanted until it has to. With an HMM of the
    model, which `paceline distil-hmm` makes, each token's chance is multiplied by the HMM's chance
    that all keywords will come within the length that is left, given prompt and output up to that
    token: p(x) * P(keywords | .., x).

    Attributes:
        words: keywords with `;` between them, quoted or not, as in `dog;"ice cream"`; `a|b` is
            either. One that begins in lower case may also begin in upper case.
        ordered: whether they come in this order. Default false.
        hmm: file of the HMM. Default none.
    """

    words: str
    ordered: bool = False
    hmm: str = ""

    order = 36
    paths = ("hmm",)
    source = Source(
        authors="Zhang et al.",
        title="GeLaTo",
        arxiv="2304.07438",
        section="sections 3 and 4",
        note="by an automaton over bytes",
    )
    catalogue = (188,)

    def __post_init__(self) -> None:
        self.ways()

    @classmethod
    def of(cls, words: Iterable[str], ordered: bool = False, hmm: str = "") -> Keywords:
        """From a list."""
        return cls(";".join(json.dumps(word, ensure_ascii=False) for word in words), ordered, hmm)

    def ways(self) -> list[Keyword]:
        """For each keyword the ways to write it.

        Raises:
            MethodError: there is none, or one is empty.
        """
        found = []
        rest = self.words
        while rest:
            item = _ITEM.match(rest)
            if item is None:
                raise MethodError(f"keywords are {self.words!r}, expected words with ; between")
            text, rest = item[1].strip(), rest[item.end() :]
            if text.startswith('"'):
                try:
                    text = json.loads(text)
                except ValueError:
                    raise MethodError(f"the keyword {text} is no JSON string") from None
            ways = [way.strip() for way in text.split("|")]
            if not all(ways):
                raise MethodError(f"keywords are {self.words!r}; one of them is empty")
            ways += [way[0].upper() + way[1:] for way in ways]
            try:
                found.append(tuple(dict.fromkeys(way.encode() for way in ways)))
            except UnicodeEncodeError:
                raise MethodError("a keyword holds half a character (a lone surrogate)") from None
        if not found:
            raise MethodError("keywords needs a word, as in keywords=dog;park")
        return found if self.ordered else list(dict.fromkeys(found))

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """At the end of the prompt.

        Raises:
            RequestError: they cannot be written, or not in `max_new_tokens`; or stop strings could
                end the text before they came.
            ModelError: the HMM cannot be used.
        """
        if request.stop_strings:
            raise RequestError("keywords cannot hold off stop strings; leave one of them out")
        spotter = _spotter(self, vocabulary, tuple(sorted(request.stop_tokens)))
        pieces = vocabulary.pieces
        before = next((pieces[token] for token in reversed(request.prompt) if pieces[token]), b"")
        start = spotter.start(before)
        need, room = int(spotter.steps[start]), request.max_new_tokens
        if need >= FAR:
            raise RequestError(f"this model has no tokens for the keywords {self.words}")
        if need > room:
            raise RequestError(
                f"the keywords {self.words} need {need} tokens, and {room} may come; allow more "
                "new tokens, or shorten the prompt"
            )
        deadline = _Deadline(self.ways(), spotter, start, request)
        if not self.hmm:
            return deadline
        hmm = read_hmm(self.hmm, vocabulary.tokenizer, vocabulary.size)
        return _Guided(deadline, hmm, hmm.outlook(spotter, room), request)


class _Deadline:
    """Forbids what leaves too few tokens for the keywords. Pure, though it remembers."""

    def __init__(
        self, ways: list[Keyword], spotter: KeywordAutomaton, start: int, request: Request
    ) -> None:
        self._ways, self.spotter = ways, spotter
        self._begin, self._length = len(request.prompt), request.max_new_tokens
        self._stops = np.array(sorted(request.stop_tokens), np.int64)
        self._taken: list[int] = []
        self._states = [start]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        state = self.follow(history)
        if not state:
            return logits
        edited: Floats = np.where(self.allowed(state, self.left(history)), logits, -np.inf)
        return edited.astype(np.float32, copy=False)

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """See `Filtering`."""
        spotter, left = self.spotter, self.left(history)
        depths = tree.depths()
        states: list[int | None] = [self.follow(history)]
        kept = np.zeros(len(tree), bool)
        kept[0] = True
        for node in range(1, len(tree)):
            before, after = states[tree.parents[node]], None
            kind = int(spotter.kind[tree.tokens[node]])
            if before is not None and kind < 0:
                kept[node] = spotter.ends[before]  # nothing comes after it
            elif before is not None:
                after = int(spotter.next[before, kind])
                kept[node] = spotter.steps[after] <= left - depths[node] + 1
                after = after if kept[node] else None
            states.append(after)
        return kept

    def check_possible(self, judges: Sequence[RejectsText]) -> None:
        """See `Demanding`."""
        for judge in judges:
            for ways in self._ways:
                if not any(judge.can_contain(way.decode()) for way in ways):
                    raise RequestError(
                        f"the keyword {ways[0].decode()!r} breaks the rules of {judge.name}; "
                        "leave one of them out"
                    )

    def left(self, history: list[int]) -> int:
        """Tokens that may come after the next one."""
        return self._begin + self._length - len(history) - 1

    def allowed(self, state: int, left: int) -> NDArray[np.bool_]:
        """Tokens [V] that leave enough for the rest."""
        near = self.spotter.steps[self.spotter.next[state]] <= left
        found: NDArray[np.bool_] = near[self.spotter.kind]
        found[self._stops] = self.spotter.ends[state]
        return found

    def follow(self, history: list[int]) -> int:
        """The state at the end of a history; 0, where nothing is wanted, behind a stop token."""
        wanted = history[self._begin :]
        same = shared(self._taken, wanted)
        del self._taken[same:], self._states[same + 1 :]
        for token in wanted[same:]:
            kind = self.spotter.kind[token]
            state = int(self.spotter.next[self._states[-1], kind]) if kind >= 0 else 0
            self._taken.append(token)
            self._states.append(state)
        return self._states[-1]


class _Guided:
    """A deadline, and before it the HMM's advice."""

    def __init__(self, deadline: _Deadline, hmm: Hmm, outlook: Doubles, request: Request) -> None:
        self._deadline, self._hmm, self._outlook = deadline, hmm, outlook
        self._taken: list[int] = []
        self._hidden = [hmm.initial]  # of the next token, behind each token of the history
        self._size = hmm.emission.shape[1]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        state = self._deadline.follow(history)
        if not state:
            return logits
        left = self._deadline.left(history)
        allowed = self._deadline.allowed(state, left)
        probs = self.probs(state, self._follow(history), max(left, 0))
        edited = logits + np.log(np.maximum(probs, _LEAST)).astype(np.float32)
        found: Floats = np.where(allowed, edited, np.float32(-np.inf))
        return found

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """See `Filtering`."""
        return self._deadline.allows(history, tree)

    def check_possible(self, judges: Sequence[RejectsText]) -> None:
        """See `Demanding`."""
        self._deadline.check_possible(judges)

    def probs(self, state: int, hidden: Doubles, left: int) -> Doubles:
        """P(all keywords in time | history and each token next), [V]."""
        spotter = self._deadline.spotter
        targets, place = np.unique(spotter.next[state], return_inverse=True)
        both = (hidden * self._outlook[left, targets]) @ self._hmm.emission  # [targets, V]
        found = both[place[spotter.kind], np.arange(self._size)]
        found /= hidden @ self._hmm.emission
        found[spotter.kind < 0] = spotter.ends[state]
        capped: Doubles = np.minimum(found, 1.0)
        return capped

    def _follow(self, history: list[int]) -> Doubles:
        same = shared(self._taken, history)
        del self._taken[same:], self._hidden[same + 1 :]
        for token in history[same:]:
            self._hidden.append(self._hmm.predict(self._hidden[-1], token))
            self._taken.append(token)
        return self._hidden[-1]


def _pieces(vocabulary: Vocabulary) -> list[bytes]:
    """What tokens add to a text for sure.

    Where a tokenizer falls back to bytes, one that is no character spoils all those beside it: an
    ASCII one is worth nothing there.
    """
    found = list(vocabulary.pieces)
    for token in vocabulary.tokenizer.byte_tokens:
        if token < len(found) and found[token] < b"\x80":
            found[token] = b"\xff"
    return found


_Key = tuple[Keywords, tuple[int, ...]]
_known: WeakKeyDictionary[Vocabulary, dict[_Key, KeywordAutomaton]] = WeakKeyDictionary()


def _spotter(method: Keywords, vocabulary: Vocabulary, stops: tuple[int, ...]) -> KeywordAutomaton:
    known = _known.setdefault(vocabulary, {})
    key = (method, stops)
    if key not in known:
        while len(known) >= _COMPILED:
            del known[next(iter(known))]
        known[key] = KeywordAutomaton(method.ways(), method.ordered, _pieces(vocabulary), stops)
    return known[key]

"""Required keywords."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.compatibility import Side, check
from paceline.control.base import ControlMethod, shared
from paceline.control.capabilities import RejectsText
from paceline.control.lexical.hmm import Doubles, Hmm, read_hmm
from paceline.control.lexical.keyword_automaton import FAR, Keyword, KeywordAutomaton
from paceline.core import Control, Exactness, Floats, Request, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_COMPILED = 16  # automata kept for each model
_ITEM = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^;"]*)\s*(?:;|$)')
_SMALLEST = 1e-300  # keeps a probability that underflows apart from 0


@controls.register("keywords", Exactness.EXACT)
@dataclass(frozen=True)
class Keywords(ControlMethod):
    """Make the output contain given words, as whole words, in any order or in the given one.

    Stop tokens are forbidden until all words have occurred, and so is every token after which too
    few tokens would be left for the missing words. So an output that ends at `max_new_tokens`, or
    at the model's context length, contains them as well.

    Without more, a model ignores the words until it is forced to write them. With an HMM of the
    model, made by `paceline distil-hmm`, the probability of each token x is multiplied by the HMM's
    probability that all keywords occur in the remaining length: p(x) * P(keywords | .., x).

    Attributes:
        words: keywords separated by `;`, quoted or not, as in `dog;"ice cream"`; `a|b` accepts
            either. The first letter may also be written as a capital.
        ordered: whether they must occur in this order. Default false.
        hmm: path of the HMM's file. Default none.
    """

    words: str
    ordered: bool = False
    hmm: str = ""

    order = 36
    examples = ("keywords:words=dog;a",)
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
        """Build it from a list of words."""
        return cls(";".join(json.dumps(word, ensure_ascii=False) for word in words), ordered, hmm)

    def ways(self) -> list[Keyword]:
        """Return the accepted spellings of each keyword.

        Raises:
            MethodError: there is no keyword, or one is empty or malformed.
        """
        keywords = []
        rest = self.words
        while rest:
            item = _ITEM.match(rest)
            if item is None:
                raise MethodError(f"keywords are {self.words!r}, expected words separated by ;")
            text, rest = item[1].strip(), rest[item.end() :]
            if not rest and item[0].endswith(";"):
                raise MethodError(f"keywords are {self.words!r}; one of them is empty")
            if text.startswith('"'):
                try:
                    text = json.loads(text)
                except ValueError:
                    raise MethodError(f"the keyword {text} is not a JSON string") from None
            ways = [way.strip() for way in text.split("|")]
            if not all(ways):
                raise MethodError(f"keywords are {self.words!r}; one of them is empty")
            ways += [way[0].upper() + way[1:] for way in ways]
            try:
                keywords.append(tuple(dict.fromkeys(way.encode() for way in ways)))
            except UnicodeEncodeError:
                raise MethodError("a keyword holds half a character (a lone surrogate)") from None
        if not keywords:
            raise MethodError("keywords needs a word, as in keywords=dog;park")
        return keywords if self.ordered else list(dict.fromkeys(keywords))

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for an output after the prompt.

        Raises:
            RequestError: the words cannot be written, or not within `max_new_tokens`; or stop
                strings could end the text before they have occurred.
            ModelError: the HMM cannot be used.
        """
        if request.stop_strings:
            check({Side.END_CONTROL: "the control keywords", Side.STOP_STRINGS: "stop strings"})
        automaton = _automaton(self, vocabulary, tuple(sorted(request.stop_tokens)))
        pieces = vocabulary.pieces
        before = next((pieces[token] for token in reversed(request.prompt) if pieces[token]), b"")
        start = automaton.start(before)
        need, room = int(automaton.steps[start]), request.max_new_tokens
        if need >= FAR:
            raise RequestError(f"this model has no tokens for the keywords {self.words}")
        if need > room:
            raise RequestError(
                f"the keywords {self.words} need {need} tokens, and {room} are allowed; allow more "
                "new tokens, or shorten the prompt"
            )
        deadline = _Deadline(self.ways(), automaton, start, request)
        if not self.hmm:
            return deadline
        hmm = read_hmm(self.hmm, vocabulary.tokenizer, vocabulary.size)
        return _Guided(deadline, hmm, hmm.outlook(automaton, room), request)


class _Deadline:
    """Forbids tokens that leave too few for the keywords. Pure; caches the last history."""

    def __init__(
        self, ways: list[Keyword], automaton: KeywordAutomaton, start: int, request: Request
    ) -> None:
        self._ways, self.automaton = ways, automaton
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
        """See `FiltersDrafts`."""
        automaton, left = self.automaton, self.left(history)
        depths = tree.depths()
        states: list[int | None] = [self.follow(history)]
        kept = np.zeros(len(tree), bool)
        kept[0] = True
        for node in range(1, len(tree)):
            before, after = states[tree.parents[node]], None
            kind = int(automaton.kind[tree.tokens[node]])
            if before is not None and kind < 0:
                kept[node] = automaton.ends[before]  # a stop token: nothing follows
            elif before is not None:
                after = int(automaton.next[before, kind])
                kept[node] = automaton.steps[after] <= left - depths[node] + 1
                after = after if kept[node] else None
            states.append(after)
        return kept

    def check_possible(self, rejecting: Sequence[RejectsText]) -> None:
        """See `RequiresText`."""
        for control in rejecting:
            for ways in self._ways:
                if not any(control.can_contain(way.decode()) for way in ways):
                    raise RequestError(
                        f"the keyword {ways[0].decode()!r} breaks the rules of {control.name}; "
                        "leave one of them out"
                    )

    def left(self, history: list[int]) -> int:
        """Return how many tokens may follow the next one."""
        return self._begin + self._length - len(history) - 1

    def allowed(self, state: int, left: int) -> NDArray[np.bool_]:
        """Return the tokens, bool [V], after which `left` more tokens suffice."""
        near = self.automaton.steps[self.automaton.next[state]] <= left
        allowed: NDArray[np.bool_] = near[self.automaton.kind]
        allowed[self._stops] = self.automaton.ends[state]
        return allowed

    def follow(self, history: list[int]) -> int:
        """Return the automaton's state at the end of a history; 0 (done) after a stop token."""
        wanted = history[self._begin :]
        same = shared(self._taken, wanted)
        del self._taken[same:], self._states[same + 1 :]
        for token in wanted[same:]:
            kind = self.automaton.kind[token]
            state = int(self.automaton.next[self._states[-1], kind]) if kind >= 0 else 0
            self._taken.append(token)
            self._states.append(state)
        return self._states[-1]


class _Guided:
    """Adds the HMM's probabilities to a deadline."""

    def __init__(self, deadline: _Deadline, hmm: Hmm, outlook: Doubles, request: Request) -> None:
        self._deadline, self._hmm, self._outlook = deadline, hmm, outlook
        self._taken: list[int] = []
        self._hidden = [hmm.initial]  # distribution over states after each token of the history
        self._size = hmm.emission.shape[1]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        state = self._deadline.follow(history)
        if not state:
            return logits
        left = self._deadline.left(history)
        allowed = self._deadline.allowed(state, left)
        probs = self.probs(state, self._follow(history), max(left, 0))
        edited = logits + np.log(np.maximum(probs, _SMALLEST)).astype(np.float32)
        masked: Floats = np.where(allowed, edited, np.float32(-np.inf))
        return masked

    def allows(self, history: list[int], tree: TokenTree) -> NDArray[np.bool_]:
        """See `FiltersDrafts`."""
        return self._deadline.allows(history, tree)

    def check_possible(self, rejecting: Sequence[RejectsText]) -> None:
        """See `RequiresText`."""
        self._deadline.check_possible(rejecting)

    def probs(self, state: int, hidden: Doubles, left: int) -> Doubles:
        """Return P(all keywords in time | history, next token) for every token, [V].

        Args:
            state: of the automaton at the end of the history.
            hidden: [Z], distribution over the HMM's states.
            left: tokens that may follow the next one.
        """
        automaton = self._deadline.automaton
        targets, index = np.unique(automaton.next[state], return_inverse=True)
        both = (hidden * self._outlook[left, targets]) @ self._hmm.emission  # [targets, V]
        probs = both[index[automaton.kind], np.arange(self._size)]
        probs /= hidden @ self._hmm.emission
        probs[automaton.kind < 0] = automaton.ends[state]
        capped: Doubles = np.minimum(probs, 1.0)
        return capped

    def _follow(self, history: list[int]) -> Doubles:
        same = shared(self._taken, history)
        del self._taken[same:], self._hidden[same + 1 :]
        for token in history[same:]:
            self._hidden.append(self._hmm.predict(self._hidden[-1], token))
            self._taken.append(token)
        return self._hidden[-1]


def _pieces(vocabulary: Vocabulary) -> list[bytes]:
    """Return the bytes that each token is sure to add to a text, [V].

    With byte-fallback tokenizers, an invalid byte also spoils its neighbours in the same run, so an
    ASCII byte token cannot be counted on.
    """
    pieces = list(vocabulary.pieces)
    for token in vocabulary.tokenizer.byte_tokens:
        if token < len(pieces) and pieces[token] < b"\x80":
            pieces[token] = b"\xff"
    return pieces


_Key = tuple[Keywords, tuple[int, ...]]
_known: WeakKeyDictionary[Vocabulary, dict[_Key, KeywordAutomaton]] = WeakKeyDictionary()


def _automaton(
    method: Keywords, vocabulary: Vocabulary, stops: tuple[int, ...]
) -> KeywordAutomaton:
    known = _known.setdefault(vocabulary, {})
    key = (method, stops)
    if key not in known:
        while len(known) >= _COMPILED:
            del known[next(iter(known))]
        known[key] = KeywordAutomaton(method.ways(), method.ordered, _pieces(vocabulary), stops)
    return known[key]

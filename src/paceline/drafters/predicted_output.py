"""Predicted output: the user says what the answer will mostly be."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.errors import MethodError, RequestError
from paceline.registry import Source, check_range, drafters


@drafters.register("predicted_output", Exactness.EXACT, aliases=("phrases",))
@dataclass(frozen=True)
class PredictedOutput(DraftMethod):
    """Follows a text that the user gives with the request, and finds back to it after an edit.

    The output is aligned with the prediction token by token. While they agree, the prediction's
    next tokens are the branch. Where they part, the places are guessed at which they meet again:
    behind what was inserted, behind what was replaced, and wherever the last tokens stand in the
    prediction, the longest match first, then the nearest. Each place is a branch, and how often
    each kind of place is right is learnt on the way, so that the scores are chances. Without a
    prediction it is plain decoding.

    State: 20 floats; the prediction lives with its request. Memory: 16 bytes for each token of the
    prediction. Cost of a proposal: 5 to 10 microseconds a node and 30 for each new token, more
    where that token is frequent in a long prediction.
    Good for: editing, correcting, translating templates and code, extraction from a document.

    Attributes:
        branches: places followed at once. Default 4.
        rate: speed at which the chances are learnt. Default 0.05: about 20 tokens; the chance to
            meet again differs from task to task.
        capacity: most tokens of a prediction. Default 65536.
    """

    source = Source(authors="Yang et al.", title="Inference with Reference", arxiv="2304.04487")

    branches: int = 4
    rate: float = 0.05
    capacity: int = 1 << 16

    def __post_init__(self) -> None:
        check_range(1, 64, "predicted_output", branches=self.branches)
        check_range(0.0, 1.0, "predicted_output", rate=self.rate)
        check_range(1, 1 << 24, "predicted_output", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """A drafter that waits for a request with a prediction."""
        return _PredictedOutput(self, target.vocab_size)


class _Place(NamedTuple):
    """Where the output may stand: behind token `at` of the prediction, which -1 precedes."""

    at: int
    length: int  # tokens before it that agree
    kind: int  # of how it was found, without the length


_FOLLOWED, _MATCHED, _REPLACED, _INSERTED = range(4)
_LENGTHS = 5  # 0 or 1, 2-3, 4-7, 8-15, more; for the last two kinds the tokens since they parted
_ANCHOR = 2  # tokens that must agree for an alignment to be believed
# Before anything is learnt.
_START = (
    (0.6, 0.85, 0.9, 0.95, 0.98),
    (0.3, 0.5, 0.7, 0.8, 0.9),
    (0.4, 0.2, 0.1, 0.05, 0.02),
    (0.3, 0.2, 0.1, 0.05, 0.02),
)


class _PredictedOutput(Drafter):
    origins = ("predicted_output",)
    uses_prediction = True

    def __init__(self, method: PredictedOutput, vocab_size: int) -> None:
        self._method = method
        self._vocab_size = vocab_size
        self.reset()

    def reset(self) -> None:
        self._chances = np.array(_START, np.float32)
        self._start((), 0)

    def begin(self, request: Request) -> None:
        if len(request.prediction) > self._method.capacity:
            raise RequestError(
                f"the prediction has {len(request.prediction)} tokens, more than "
                f"predicted_output:capacity={self._method.capacity}; shorten it or raise that"
            )
        if any(not 0 <= token < self._vocab_size for token in request.prediction):
            raise RequestError(f"the prediction has tokens outside 0..{self._vocab_size - 1}")
        self._start(request.prediction, len(request.prompt))

    def _start(self, prediction: tuple[int, ...], read: int) -> None:
        self._prediction = np.array(prediction, np.int32)
        self._by_token = self._prediction.argsort(kind="stable")  # its places
        self._sorted = self._prediction[self._by_token]
        self._found = np.zeros(0, np.int64)  # places of the last token
        self._lengths = np.zeros(0, np.int64)  # tokens up to each that agree
        self._read = read  # tokens of the context
        self._aligned = -1  # the place last believed
        self._parted = 0  # tokens since then

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        if not len(self._prediction):
            return TokenTree.root(int(context[-1]))
        for token in context[self._read :].tolist():
            self._learn(token)
            self._follow(token)
        self._read = len(context)
        return self._grow(int(context[-1]), budget)

    def _follow(self, token: int) -> None:
        """Align the next token of the output."""
        first, last = self._sorted.searchsorted((token, token + 1))
        found = self._by_token[first:last]
        lengths = np.ones(len(found), np.int64)
        if len(self._found):
            before = self._found.searchsorted(found - 1).clip(max=len(self._found) - 1)
            lengths += np.where(self._found[before] == found - 1, self._lengths[before], 0)
        self._found, self._lengths = found, lengths
        onward = self._aligned + 1
        inside = not self._parted and onward < len(self._prediction)
        if inside and self._prediction[onward] == token:
            self._aligned = onward
            return
        best = self._nearest(1)
        if best and best[0][1] >= _ANCHOR:
            self._aligned, self._parted = best[0][0], 0
        else:
            self._parted += 1

    def _nearest(self, count: int) -> list[tuple[int, int]]:
        """Places where the last tokens stand, and how many: the most first, then the nearest."""
        away = self._found - (self._aligned + self._parted)
        rank = (2 * np.abs(away) + (away > 0)) - (self._lengths << 32)
        best = np.arange(len(rank))
        if len(rank) > count:
            best = rank.argpartition(count)[:count]
        best = best[rank[best].argsort()]
        return list(zip(self._found[best].tolist(), self._lengths[best].tolist(), strict=True))

    def _places(self) -> list[_Place]:
        """Where the output may stand, the likeliest kind first."""
        parted, found = self._parted, []
        if not parted:
            found.append(_Place(self._aligned, self._agreed(), _FOLLOWED))
        for at, length in self._nearest(self._method.branches):
            found.append(_Place(at, length, _MATCHED))
        if parted:
            found.append(_Place(self._aligned + parted, parted, _REPLACED))
            found.append(_Place(self._aligned, parted, _INSERTED))
        kept: dict[int, _Place] = {}
        for place in found:
            kept.setdefault(place.at, place)
        return list(kept.values())[: self._method.branches]

    def _agreed(self) -> int:
        """Tokens that agree up to the alignment."""
        if self._aligned < 0:
            return 0
        return int(self._lengths[self._found.searchsorted(self._aligned)])

    def _named(self, places: list[_Place]) -> Iterator[tuple[int, tuple[int, int]]]:
        """The tokens that places name, each once, with the kind of the first place to do so."""
        named: set[int] = set()
        for place in places:
            if place.at + 1 < len(self._prediction):
                token = int(self._prediction[place.at + 1])
                if token not in named:
                    named.add(token)
                    yield token, _cell(place)

    def _learn(self, token: int) -> None:
        for guess, cell in self._named(self._places()):
            hit = guess == token
            self._chances[cell] += self._method.rate * (hit - self._chances[cell])
            if hit:
                return

    def _onward(self, places: list[_Place], token: int) -> list[_Place]:
        """The places after `token`, of those that named it."""
        return [
            _Place(at + 1, length + 1 if kind <= _MATCHED else 1, min(kind, _MATCHED))
            for at, length, kind in places
            if at + 1 < len(self._prediction) and self._prediction[at + 1] == token
        ]

    def _grow(self, root: int, budget: int) -> TokenTree:
        """The likeliest paths first, until the budget is full."""
        tokens, parents, scores = [root], [-1], [1.0]
        paths, places = [1.0], [self._places()]
        waiting: list[tuple[float, int, int, float]] = []
        for node in range(budget):
            left = 1.0
            for token, cell in self._named(places[node]):
                chance = float(self._chances[cell])
                entry = (-paths[node] * left * chance, node, token, left * chance)
                heapq.heappush(waiting, entry)
                left *= 1.0 - chance
            if not waiting:
                break
            path, parent, token, chance = heapq.heappop(waiting)
            tokens.append(token)
            parents.append(parent)
            scores.append(chance)
            paths.append(-path)
            places.append(self._onward(places[parent], token))
        return single_origin_tree(
            np.array(tokens, np.int32), np.array(parents, np.int32), np.array(scores, np.float32)
        )

    def state(self) -> State:
        return {"chances": self._chances.copy()}

    def load(self, state: State) -> None:
        learnt, mine = state.get("chances"), self._chances
        if learnt is None or learnt.shape != mine.shape or learnt.dtype != mine.dtype:
            raise MethodError("this state is not of predicted_output; reset it")
        if not ((learnt >= 0) & (learnt <= 1)).all():
            raise MethodError("this state of predicted_output holds chances outside 0..1; reset it")
        self._chances = learnt.copy()


def _cell(place: _Place) -> tuple[int, int]:
    """Where the chance of a place is kept."""
    length = max(place.length, 1).bit_length() - 1
    return place.kind, min(length, _LENGTHS - 1)

"""Predicted output: the request brings a text that the output will mostly repeat."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from paceline.core import Exactness, Request, State, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.drafters.state import checked
from paceline.errors import RequestError
from paceline.registry import Source, check_range, drafters


@drafters.register("predicted_output", Exactness.EXACT, aliases=("phrases",))
@dataclass(frozen=True)
class PredictedOutput(DraftMethod):
    """Follow a text that comes with the request, and find the way back to it after an edit.

    The output is aligned with the prediction token by token. While they agree, the prediction's
    next tokens are the branch. Where they differ, candidates are positions at which they may meet
    again: after an insertion, after a replacement, and wherever the last tokens occur in the
    prediction, the longest match first, then the nearest. Each position is a branch, and how often
    each kind of position is right is learnt, so that scores are probabilities. Without a prediction
    it is plain decoding.

    State: 20 floats; the prediction lives with its request. Memory: 16 bytes for each token of the
    prediction. Cost of a proposal: 5 to 10 microseconds a node and 30 for each new token, more
    where that token is frequent in a long prediction.
    Good for: editing, correcting, translating templates and code, extraction from a document.

    Based on Yang et al., Inference with Reference, arXiv 2304.04487, with alignment and trees for
    its copied spans.

    Attributes:
        branches: positions followed at once. Default 4.
        rate: learning rate of the probabilities, 0 to 1. Default 0.05: about 20 tokens; how likely
            it is to meet again differs from task to task.
        capacity: most tokens of a prediction. Default 65536.
    """

    source = Source(authors="Yang et al.", title="Inference with Reference", arxiv="2304.04487")
    examples = ("predicted_output", "predicted_output:branches=1")

    branches: int = 4
    rate: float = 0.05
    capacity: int = 1 << 16

    def __post_init__(self) -> None:
        check_range(1, 64, "predicted_output", branches=self.branches)
        check_range(0.0, 1.0, "predicted_output", rate=self.rate)
        check_range(1, 1 << 24, "predicted_output", capacity=self.capacity)

    def build(self, target: Target) -> Drafter:
        """Return a drafter for requests with a prediction."""
        return _PredictedOutput(self, target.vocab_size)


class _Position(NamedTuple):
    """Where the output may be: after token `at` of the prediction; -1 is before the first."""

    at: int
    length: int  # tokens before it that agree
    kind: int  # how it was found


_FOLLOWED, _MATCHED, _REPLACED, _INSERTED = range(4)
_LENGTHS = 5  # 0 or 1, 2-3, 4-7, 8-15, more; for the last two kinds the tokens since they differ
_ANCHOR = 2  # tokens that must agree to accept an alignment
# Probabilities [kind, length] before anything is learnt.
_START = (
    (0.6, 0.85, 0.9, 0.95, 0.98),
    (0.3, 0.5, 0.7, 0.8, 0.9),
    (0.4, 0.2, 0.1, 0.05, 0.02),
    (0.3, 0.2, 0.1, 0.05, 0.02),
)


class _PredictedOutput(Drafter):
    origins = ("predicted_output",)
    uses_prediction = only_prediction = True

    def __init__(self, method: PredictedOutput, vocab_size: int) -> None:
        self._method = method
        self._vocab_size = vocab_size
        self.reset()

    def reset(self) -> None:
        self._probs = np.array(_START, np.float32)
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
        self._by_token = self._prediction.argsort(kind="stable")  # its positions by token
        self._sorted = self._prediction[self._by_token]
        self._matches = np.zeros(0, np.int64)  # positions of the last token
        self._lengths = np.zeros(0, np.int64)  # tokens up to each of them that agree
        self._read = read  # tokens of the context
        self._aligned = -1  # the last accepted position
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
        """Align the next token of the output with the prediction."""
        first, last = self._sorted.searchsorted((token, token + 1))
        matches = self._by_token[first:last]
        lengths = np.ones(len(matches), np.int64)
        if len(self._matches):
            before = self._matches.searchsorted(matches - 1).clip(max=len(self._matches) - 1)
            lengths += np.where(self._matches[before] == matches - 1, self._lengths[before], 0)
        self._matches, self._lengths = matches, lengths
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
        """Return positions of the last tokens and how many match: most first, then the nearest."""
        away = self._matches - (self._aligned + self._parted)
        rank = (2 * np.abs(away) + (away > 0)) - (self._lengths << 32)
        best = np.arange(len(rank))
        if len(rank) > count:
            best = rank.argpartition(count)[:count]
        best = best[rank[best].argsort()]
        return list(zip(self._matches[best].tolist(), self._lengths[best].tolist(), strict=True))

    def _positions(self) -> list[_Position]:
        """Return where the output may be, the most likely kind first."""
        parted, candidates = self._parted, []
        if not parted:
            candidates.append(_Position(self._aligned, self._agreed(), _FOLLOWED))
        for at, length in self._nearest(self._method.branches):
            candidates.append(_Position(at, length, _MATCHED))
        if parted:
            candidates.append(_Position(self._aligned + parted, parted, _REPLACED))
            candidates.append(_Position(self._aligned, parted, _INSERTED))
        kept: dict[int, _Position] = {}
        for position in candidates:
            kept.setdefault(position.at, position)
        return list(kept.values())[: self._method.branches]

    def _agreed(self) -> int:
        """Return how many tokens agree up to the alignment."""
        if self._aligned < 0:
            return 0
        return int(self._lengths[self._matches.searchsorted(self._aligned)])

    def _next(self, positions: list[_Position]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield the tokens that follow some positions, each once, with the first one's cell."""
        seen: set[int] = set()
        for position in positions:
            if position.at + 1 < len(self._prediction):
                token = int(self._prediction[position.at + 1])
                if token not in seen:
                    seen.add(token)
                    yield token, _cell(position)

    def _learn(self, token: int) -> None:
        for guess, cell in self._next(self._positions()):
            hit = guess == token
            self._probs[cell] += self._method.rate * (hit - self._probs[cell])
            if hit:
                return

    def _after(self, positions: list[_Position], token: int) -> list[_Position]:
        """Return the positions one token on, of those that `token` follows."""
        return [
            _Position(at + 1, length + 1 if kind <= _MATCHED else 1, min(kind, _MATCHED))
            for at, length, kind in positions
            if at + 1 < len(self._prediction) and self._prediction[at + 1] == token
        ]

    def _grow(self, root: int, budget: int) -> TokenTree:
        """Grow the tree best-first by path probability until the budget is full."""
        tokens, parents, scores = [root], [-1], [1.0]
        paths, positions = [1.0], [self._positions()]
        waiting: list[tuple[float, int, int, float]] = []
        for node in range(budget):
            left = 1.0
            for token, cell in self._next(positions[node]):
                probability = float(self._probs[cell])
                score = left * probability
                heapq.heappush(waiting, (-paths[node] * score, node, token, score))
                left *= 1.0 - probability
            if not waiting:
                break
            path, parent, token, score = heapq.heappop(waiting)
            tokens.append(token)
            parents.append(parent)
            scores.append(score)
            paths.append(-path)
            positions.append(self._after(positions[parent], token))
        return single_origin_tree(
            np.array(tokens, np.int32), np.array(parents, np.int32), np.array(scores, np.float32)
        )

    def state(self) -> State:
        return {"chances": self._probs.copy()}

    def load(self, state: State) -> None:
        checked("predicted_output", state, self.state(), {"chances": (0, 1)})
        self._probs = state["chances"].copy()


def _cell(position: _Position) -> tuple[int, int]:
    """Return where the probability of a position is kept."""
    length = max(position.length, 1).bit_length() - 1
    return position.kind, min(length, _LENGTHS - 1)

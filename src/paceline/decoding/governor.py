"""How many nodes a pass should have: as many as pay for themselves on this machine, maybe none.

A tree of n nodes costs T(n) and the drafter's own time; its best n nodes gain A(n) tokens, one for
the root and, for every other node, the chance that it is accepted. The governor keeps the nodes
that maximise A(n) / (T(n) + drafting), and falls to plain decoding when none does. It never bets
more than it may lose: a ledger of time won and lost against plain decoding bounds the regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline import _native
from paceline.core import Cost, TokenTree
from paceline.errors import RequestError

Trees = Sequence[TokenTree]
Paths = Sequence[list[int]]


_CLEAR = 1.05  # times plain decoding's speed, from where requests that share passes draft


class Budget(Protocol):
    """Decides how much is drafted; whoever runs passes asks it before and tells it after each.

    A pass has a tree of each of some requests, and may have other tokens, `riding` along: parts of
    prompts.
    """

    def ask(self, requests: int = 1) -> int:
        """Nodes to ask each request's drafter for; 0 leaves them alone: the plain path."""
        ...

    def spare(self) -> int:
        """Nodes for guesses that are certain, where `ask` has just given 0."""
        ...

    def choose(self, trees: Trees, seconds: float, riding: int = 0) -> list[TokenTree]:
        """The parts of the proposals worth running; `seconds` is what they cost."""
        ...

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, riding: int = 0
    ) -> None:
        """What became of the trees; seconds of drafting, learning included, and of the pass."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same budget.

    Attributes:
        nodes: beyond the root.
    """

    nodes: int

    def __post_init__(self) -> None:
        if not 0 <= self.nodes <= 4096:
            raise RequestError(f"the budget is {self.nodes} nodes, expected 0 to 4096")

    def ask(self, requests: int = 1) -> int:
        """See `Budget`."""
        return self.nodes

    def spare(self) -> int:
        """See `Budget`: none, since it rests where nothing is to be guessed at all."""
        return 0

    def choose(self, trees: Trees, seconds: float, riding: int = 0) -> list[TokenTree]:
        """See `Budget`."""
        return list(trees)

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, riding: int = 0
    ) -> None:
        """See `Budget`."""


class Calibration:
    """How often guesses come true, compared with their scores, by origin and depth.

    Counts fade by `decay` a pass, so that a text that changes is followed. A guess's chance is its
    score times accepted / predicted of its kind; `prior` guesses at face value damp the start.
    """

    DEPTHS = 8

    def __init__(self, decay: float = 0.98, prior: float = 0.5) -> None:
        self.decay, self.prior = decay, prior
        self.predicted: NDArray[np.float64] = np.zeros((0, self.DEPTHS))
        self.accepted: NDArray[np.float64] = np.zeros((0, self.DEPTHS))

    def chances(self, trees: Trees) -> NDArray[np.float64]:
        """Chance that each node of all trees is reached and accepted, float64 [sum N]."""
        forest = _Forest(trees)
        kinds = self._kinds(forest)
        ratio = (self.accepted + self.prior) / (self.predicted + self.prior)
        return _native.reached(forest.parents, forest.scores * ratio[kinds])

    def learn(self, trees: Trees, paths: Paths) -> None:
        """Every child of an accepted node was put to the test."""
        forest = _Forest(trees)
        tested, on_path = forest.judged(paths)
        kinds = tuple(kind[tested] for kind in self._kinds(forest))
        # One tree after the other: what the first taught has faded most.
        faded = self.decay ** (len(trees) - 1 - forest.tree[tested])
        for counts, seen in ((self.predicted, forest.scores), (self.accepted, on_path)):
            counts *= self.decay ** len(trees)
            np.add.at(counts, kinds, seen[tested] * faded)

    def _kinds(self, forest: _Forest) -> tuple[NDArray[np.int16], NDArray[np.int32]]:
        """Origin and depth of each node, as `predicted` and `accepted` are indexed."""
        missing = int(forest.origin.max()) + 1 - len(self.predicted)
        if missing > 0:
            empty = np.zeros((missing, self.DEPTHS))
            self.predicted = np.concatenate([self.predicted, empty])
            self.accepted = np.concatenate([self.accepted, empty])
        depths = _native.depths(forest.parents)
        return forest.origin, np.minimum(depths, self.DEPTHS - 1)


class _Forest:
    """The nodes of some trees, one tree behind the other."""

    def __init__(self, trees: Trees) -> None:
        sizes = [len(tree) for tree in trees]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.tree = np.arange(len(trees)).repeat(sizes)  # whose each node is
        self.parents = np.concatenate([tree.parents for tree in trees])
        self.parents += self.starts[self.tree].astype(np.int32)
        self.parents[self.starts] = -1
        self.scores = np.concatenate([tree.scores for tree in trees])
        self.origin = np.concatenate([tree.origin for tree in trees]).clip(0)

    def judged(self, paths: Paths) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """The nodes that were put to the test, and the accepted ones with the roots."""
        accepted = np.zeros(len(self.parents), bool)
        for path, start in zip(paths, self.starts.tolist(), strict=True):
            accepted[[start + node for node in path]] = True
        return accepted[self.parents] & (self.parents >= 0), accepted


def judged(tree: TokenTree, path: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The nodes that were put to the test, and the accepted ones with the root; bool [N] each."""
    accepted = np.zeros(len(tree), bool)
    accepted[path] = True
    return accepted[tree.parents] & (tree.parents >= 0), accepted


@dataclass
class Governor:
    """Sizes every tree by measured cost; see the module's text.

    Attributes:
        cost: T(n), refined by every pass.
        most: largest budget that is ever asked for; None takes the size where even certain
            guesses would not pay.
        risk: share of plain decoding's time that may be lost by guessing wrong.
        patience: passes in a row without a worthwhile guess before the drafter is left alone.
        rest: passes it is then left alone; doubled each time, up to `longest_rest`.
    """

    cost: Cost
    most: int | None = None
    risk: float = 0.01
    patience: int = 4
    rest: int = 8
    longest_rest: int = 256
    calibration: Calibration = field(default_factory=Calibration)
    passes: int = 0
    plain_passes: int = 0
    probes: int = 0
    sizes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.most is None:
            self.most = _largest_useful(self.cost)
        self._nodes = np.array(self.cost.nodes)
        self._seconds = np.array(self.cost.seconds)  # T at these nodes, as passes correct it
        self._drafting = 0.0  # seconds, running mean
        self._kept = 4.0  # nodes of a tree beyond its root, running mean
        self._balance = 3.0 * self.cost.at(1)  # seconds that may still be lost
        self._idle = 0
        self._resting = 0
        self._next_rest = self.rest
        self._tired = 0  # requests of the pass after which it rests
        self._off = False
        self._saved = self._worst = 0.0  # seconds against plain decoding, and their lowest
        self._last: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def ask(self, requests: int = 1) -> int:
        """See `Budget`."""
        if self._resting and 2 * requests <= self._tired:  # what did not pay with load now may
            self._resting, self._next_rest = 0, self.rest
        if self._resting > 0 or self._balance < 0:
            self._off = True
            return 0
        most = self.most or 0
        if requests == 1:
            return most
        sizes = requests + np.arange(1 + requests * most)
        useful = np.flatnonzero(sizes * self.seconds(requests) > requests * self.seconds(sizes))
        # Some guess better than others: twice an equal share leaves a choice. But nodes that are
        # never chosen cost time, too: no more than a few times what was kept of late.
        share = -(-2 * int(useful.max(initial=0)) // requests)
        return min(most, share, 4 + int(3 * self._kept))

    def spare(self) -> int:
        """See `Budget`: what is certain is no bet, so neither rest nor ledger keeps it back."""
        return self.most or 0

    def choose(self, trees: Trees, seconds: float, riding: int = 0) -> list[TokenTree]:
        """Keep the likeliest nodes of all trees up to the size with the most tokens a second.

        The nodes of all requests compete: each goes where it is most likely to be accepted.
        """
        chances = self.calibration.chances(trees)
        requests, ends = len(trees), np.cumsum([len(tree) for tree in trees])
        first = chances.copy()
        first[[0, *ends[:-1]]] = 2.0  # roots come first
        order = np.argsort(-first, kind="stable")  # parents come before their children
        tokens = np.cumsum(chances[order])[requests - 1 :]
        passes = self.seconds(requests + riding + np.arange(len(tokens))) - self._ride(
            trees, riding
        )
        drafting = max(seconds, requests * self._drafting)
        self._last = tokens / requests, (passes + drafting) / passes[0]
        self.probes += self._off
        self._off = False
        # Once drafted, the proposal is paid for; but if plain would have won, say so to `ask`.
        best = int(np.argmax(tokens / (passes + drafting)))
        # Beside others a gain must be clear: what a choice costs them is not all measured.
        sure = 1.0 if requests == 1 else _CLEAR
        worth = tokens[best] / (passes[best] + drafting) > sure * requests / passes[0]
        best = best if worth or requests == 1 else 0
        self._idle = 0 if worth and best else self._idle + 1
        if self._idle >= self.patience:
            self._idle, self._resting, self._tired = 0, self._next_rest, requests
            self._next_rest = min(2 * self._next_rest, self.longest_rest)
        elif worth:
            self._next_rest = self.rest
        keep = np.zeros(len(chances), bool)
        keep[order[: requests + best]] = True
        self._kept += 0.1 * (best / requests - self._kept)
        return [
            tree.keep(keep[end - len(tree) : end])
            for tree, end in zip(trees, ends.tolist(), strict=True)
        ]

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, riding: int = 0
    ) -> None:
        """See `Budget`."""
        requests, nodes = len(trees), sum(map(len, trees))
        self.passes += 1
        self.sizes[nodes] = self.sizes.get(nodes, 0) + 1
        self._resting -= self._resting > 0
        plain = float(self.seconds(requests))
        if nodes == requests and draft == 0.0:  # the plain path: leave next to nothing of us in it
            self.plain_passes += 1
            self._balance = min(self._balance + self.risk * plain, 3.0 * plain)
            if requests > 1 or self.plain_passes % 16 == 0:
                self._refine(nodes, forward, riding)
            return
        forward = self._refine(nodes, forward, riding) - self._ride(trees, riding)
        if self._off:  # certain guesses while the drafter rests: they say nothing about it
            won = sum(map(len, paths)) * plain / requests - draft - forward
            self._saved += won
            self._worst = min(self._worst, self._saved)
            self._balance = min(self._balance + won, 3.0 * plain)
            return
        draft = min(draft, 4.0 * requests * self._drafting or draft)
        self._drafting += 0.1 * (draft / requests - self._drafting)
        self.calibration.learn(trees, paths)
        won = sum(map(len, paths)) * plain / requests - draft - forward
        self._saved += won
        self._worst = min(self._worst, self._saved)
        self._balance = min(self._balance + won + self.risk * plain, 3.0 * plain)

    def seconds(self, size: ArrayLike) -> NDArray[np.float64]:
        """T(n) as passes corrected it; beyond the largest known size it goes on as steeply."""
        sizes, times, nodes = self._nodes, self._seconds, np.asarray(size)
        found = np.interp(nodes, sizes, times)
        if len(sizes) > 1:
            slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
            found = found + slope * np.maximum(nodes - sizes[-1], 0)
        return np.asarray(found)

    def _ride(self, trees: Trees, riding: int) -> float:
        """What `riding` tokens add to a pass of the roots; they are no cost of the guesses."""
        if not riding:
            return 0.0
        return float(self.seconds(len(trees) + riding) - self.seconds(len(trees)))

    def _refine(self, nodes: int, forward: float, riding: int) -> float:
        """Correct T(n) by a pass, most where it was run; return its time without hiccups.

        Other work on the machine slows every size: all of the curve follows a little. A pass that
        was interrupted says nothing about speculation: it counts at most twice what was expected.
        One with parts of prompts, which have other rows and sequences, says nothing about trees.
        """
        expected = float(self.seconds(nodes + riding))
        forward = min(forward, 2.0 * expected)
        if riding:
            return forward
        near = np.exp(-np.abs(np.log2(self._nodes / (nodes + riding))))
        change = max(forward / expected, 0.5) - 1.0
        self._seconds *= 1.0 + change * (0.02 + 0.08 * near)
        return forward

    def report(self) -> dict[str, object]:
        """What it did and why, for bench and JSON; `docs/bench-json.md` says what is what."""
        return {
            "reason": self._reason(),
            "passes": self.passes,
            "plain_passes": self.plain_passes,
            "probes": self.probes,
            "sizes": {str(n): self.sizes[n] for n in sorted(self.sizes)},
            "draft_seconds": self._drafting,
            "pass_seconds": dict(
                zip(map(str, self.cost.nodes), self._seconds.tolist(), strict=True)
            ),
            "balance_seconds": self._balance,
            "saved_seconds": self._saved,
            "regret_seconds": -self._worst,
        }

    def _reason(self) -> str:
        """Why the next pass would be plain, or else what the last tree promised."""
        if not self.most:
            two = self.cost.at(2) / self.cost.at(1)
            return f"plain: no tree can pay, 2 nodes cost {two:.2f} plain passes"
        if self._balance < 0:
            return "plain: guesses lost all the time that they may for now"
        if self._last is None:
            return "plain: no tree was asked for yet"
        tokens, costs = self._last
        if len(tokens) == 1:
            return ("plain" if self._resting else "drafting") + ": the drafter had no guess"
        best = 1 + int(np.argmax(tokens[1:] / costs[1:]))
        promise = f"best expected {tokens[best]:.2f} tokens for {costs[best]:.2f} of the cost"
        if tokens[best] > costs[best]:
            return f"drafting: {promise}"
        return f"plain: no tree pays, {promise}"


def _largest_useful(cost: Cost) -> int:
    """Nodes beyond the root past which a pass costs more than a chain of right guesses gains."""
    useful = [n for n in cost.nodes if n * cost.at(1) > cost.at(n)]
    return min(max(useful, default=1), 64) - 1

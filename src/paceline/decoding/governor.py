"""How many nodes a pass should have: as many as pay for themselves on this machine, maybe none.

A tree of n nodes costs T(n) plus the drafter's time. Its best n nodes are expected to gain A(n)
tokens: one for the root and, for every other node, the probability that it is accepted. The
governor keeps the nodes that maximise A(n) / (T(n) + drafting), and falls back to plain decoding if
none pay. A ledger of time won and lost against plain decoding bounds its regret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paceline import _native
from paceline.core import Cost, TokenTree
from paceline.engines.base import Engine
from paceline.errors import RequestError

Trees = Sequence[TokenTree]
Paths = Sequence[list[int]]


_SURE = 0.5  # fraction of the break-even probability below which a node is not proposed
_CLEAR = 1.05  # gain over plain decoding from which requests that share passes draft
# Passes with drafts after which one without them measures what it takes: first, doubled up to last.
_FIRST_CHECK, _LAST_CHECK = 2, 64
_DEAR = 0.05  # of a plain pass: a drafter that takes more has one try after a rest
_EARLY = 8  # drafts that may be slow for reasons that pass
_MOST_NODES = 128  # of a tree, where T(n) is known so far: where weights stream from disk
# Plain passes that drafts may lose where each waits for other nodes: trees are large there, and
# some fail while the text is still new.
_REMOTE_RESERVE = 24.0
_FIRST = 8  # plain passes whose time is always recorded; later ones every 16th


class Budget(Protocol):
    """Decides how much is drafted: asked before each pass, and given what came of it afterwards.

    A pass runs one tree of each of some requests, and may run `other_tokens` besides, which are
    parts of prompts.
    """

    def nodes_wanted(self, requests: int = 1) -> int:
        """Return how many nodes each request's drafter may propose; 0: decode plainly."""
        ...

    def nodes_for_forced(self) -> int:
        """Return how many forced nodes may be drafted, where `nodes_wanted` has just given 0."""
        ...

    def min_path_prob(self) -> float:
        """Return the path probability below which a node need not be proposed."""
        ...

    def prune(self, trees: Trees, seconds: float, other_tokens: int = 0) -> list[TokenTree]:
        """Return the parts of the trees that are worth running; drafting them took `seconds`."""
        ...

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, other_tokens: int = 0
    ) -> None:
        """Record accepted paths, and the seconds of drafting with learning and of the pass."""
        ...

    def charge(self, seconds: float) -> None:
        """Record time that a drafter took besides: to catch up with the text after a rest."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same budget.

    Attributes:
        nodes: below the root.
    """

    nodes: int

    def __post_init__(self) -> None:
        if not 0 <= self.nodes <= 4096:
            raise RequestError(f"the budget is {self.nodes} nodes, expected 0 to 4096")

    def nodes_wanted(self, requests: int = 1) -> int:
        """See `Budget`."""
        return self.nodes

    def nodes_for_forced(self) -> int:
        """See `Budget`: none, since a fixed budget of 0 drafts nothing."""
        return 0

    def min_path_prob(self) -> float:
        """See `Budget`: all nodes are wanted."""
        return 0.0

    def prune(self, trees: Trees, seconds: float, other_tokens: int = 0) -> list[TokenTree]:
        """See `Budget`."""
        return list(trees)

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, other_tokens: int = 0
    ) -> None:
        """See `Budget`."""

    def charge(self, seconds: float) -> None:
        """See `Budget`."""


def judged(tree: TokenTree, path: list[int]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the nodes that were tested, and the accepted ones with the root, bool [N] each."""
    accepted = np.zeros(len(tree), bool)
    accepted[path] = True
    return accepted[tree.parents] & (tree.parents >= 0), accepted


def _calibration() -> _native.AcceptanceRates:
    """Return a calibration of scores by acceptance, for each origin and depth.

    Counts decay by 2 % with every tree, so that a changing text is followed. The probability of a
    node is its score times accepted / predicted of its kind; half a node that was accepted as
    predicted is the prior.
    """
    return _native.AcceptanceRates(decay=0.98, prior=0.5)


@dataclass
class Governor:
    """Sizes every tree by measured cost; see the module's docstring.

    T(n) is refined by every pass. So that it is known for plain passes, too, one is made after 2
    passes with drafts, another after 4 more, and so on up to every 64.

    Attributes:
        cost: T(n) as it was measured before.
        max_nodes: largest budget that is ever asked for; None takes the size where even certain
            nodes would not pay.
        risk: fraction of plain decoding's time that may be lost on rejected drafts.
        patience: consecutive passes without a worthwhile node before the drafter rests. For one
            that takes more than 5 % of a plain pass, one is enough after the first rest.
        reserve: plain passes whose time may be lost at first, and later of what drafts have won.
        rest: plain passes that follow; doubled each time, up to `longest_rest`.
    """

    cost: Cost
    max_nodes: int | None = None
    risk: float = 0.01
    patience: int = 4
    rest: int = 8
    longest_rest: int = 256
    reserve: float = 3.0
    calibration: _native.AcceptanceRates = field(default_factory=_calibration)
    passes: int = 0
    plain_passes: int = 0
    probes: int = 0
    sizes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sizes_itself = self.max_nodes is None
        if self.max_nodes is None:
            self.max_nodes = _largest_useful(self.cost)
        self._curve = _native.CostCurve(self.cost.nodes, self.cost.seconds)  # as passes correct it
        self._drafting, self._drafts = 0.0, 0  # seconds, running mean, and of how many
        self._kept = 4.0  # nodes of a tree beyond its root, running mean
        self._balance = self.reserve * self.cost.at(1)  # seconds that may still be lost
        self._idle = 0
        self._resting = 0
        self._next_rest = self.rest
        self._tired = 0  # number of requests in the pass after which it rests
        self._unchecked, self._check_after = 0, _FIRST_CHECK  # passes with drafts since one without
        self._min_path_prob = 0.0
        self._off = self._checking = False
        self._saved = self._worst = 0.0  # seconds against plain decoding, and their lowest
        self._last: tuple[_native.NodeRanking, int, float] | None = None

    def measured(self) -> Cost:
        """Return T(n) as passes have corrected it."""
        return Cost(self.cost.nodes, tuple(self._curve.seconds))

    def fresh(self) -> Governor:
        """Return a governor that knows T(n) as corrected, and nothing of earlier drafts."""
        most = None if self._sizes_itself else self.max_nodes
        settings = (most, self.risk, self.patience, self.rest, self.longest_rest, self.reserve)
        other = Governor(self.measured(), *settings)
        other._check_after = self._check_after
        return other

    @property
    def resting(self) -> bool:
        """Whether the next pass will be plain, whatever the drafter would propose."""
        return self._resting > 0 or self._balance < 0 or not self.max_nodes

    @property
    def doubtful(self) -> bool:
        """Whether drafting has rested since it last paid: the next draft is a trial."""
        return self._next_rest != self.rest

    @property
    def decided(self) -> tuple[bool, bool]:
        """Return what `nodes_wanted` decided last: to rest, and to check the time of plain passes.

        Can be set, to `record` a pass that was decided before others were.
        """
        return self._off, self._checking

    @decided.setter
    def decided(self, decided: tuple[bool, bool]) -> None:
        self._off, self._checking = decided

    def nodes_wanted(self, requests: int = 1) -> int:
        """See `Budget`."""
        if (
            self._resting and 2 * requests <= self._tired
        ):  # drafting that did not pay under load may pay now
            self._resting, self._next_rest = 0, self.rest
        if self.resting:
            self._off = True
            return 0
        max_nodes = self.max_nodes or 0
        self._checking = requests == 1 and self._unchecked >= self._check_after
        if requests == 1:
            return 0 if self._checking else max_nodes
        # Drafters differ: twice an equal share leaves a choice. But nodes that are dropped cost
        # time, so no more than a few times as many as were kept recently.
        share = -(-2 * self._curve.max_useful(requests, requests * max_nodes) // requests)
        return min(max_nodes, share, 4 + int(3 * self._kept))

    def nodes_for_forced(self) -> int:
        """See `Budget`: forced nodes are no risk, so neither rest nor ledger holds them back."""
        return self.max_nodes or 0

    def min_path_prob(self) -> float:
        """See `Budget`: half of what the last node gained in the last pass, or had to gain.

        Half, since scores only approximate the probabilities by which the next `prune` decides.
        """
        return self._min_path_prob

    def prune(self, trees: Trees, seconds: float, other_tokens: int = 0) -> list[TokenTree]:
        """Keep the most likely nodes of all trees, up to the size with the most tokens a second.

        The nodes of all requests compete: each goes where it is most likely to be accepted.
        """
        requests, first = len(trees), len(trees) + other_tokens
        ranking = self.calibration.rank(trees)
        more = max(seconds, requests * self._drafting) - self._other_seconds(requests, other_tokens)
        self._last = ranking, first, more
        self.probes += self._off
        self._off = False
        # The proposal is paid for already; where plain would have won, `nodes_wanted` remembers.
        # With several requests a gain must be clear, as not all costs to the others are measured.
        margin = 1.0 if requests == 1 else _CLEAR
        best, worth, needed = ranking.choose(self._curve, first, more, margin)
        self._min_path_prob = _SURE * min(needed, 1.0)
        if worth:
            self._next_rest = self.rest
        self._idle = 0 if worth and best else self._idle + 1
        if self._idle >= self.patience:
            dear = self._drafting > _DEAR * self._at(1)
            self._idle = self.patience - 1 if dear else 0
            self._resting, self._tired = self._next_rest, requests
            self._next_rest = min(2 * self._next_rest, self.longest_rest)
        self._kept += 0.1 * (best / requests - self._kept)
        if best == len(ranking.tokens) - 1:
            return list(trees)
        return [TokenTree.trusted(*part) for part in ranking.parts(trees, best)]

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, other_tokens: int = 0
    ) -> None:
        """See `Budget`."""
        requests, nodes = len(trees), sum(map(len, trees))
        self.passes += 1
        self.sizes[nodes] = self.sizes.get(nodes, 0) + 1
        if self._off and self._resting:
            self._resting -= 1
        plain = self._at(requests)
        if nodes == requests and draft == 0.0:  # the plain path: spend next to no time here
            self.plain_passes += 1
            if self._off or self._checking:
                self._unchecked = 0
            self._balance = min(self._balance + self.risk * plain, self.reserve * plain)
            few = self.plain_passes <= _FIRST
            if requests > 1 or few or self._checking or self.plain_passes % 16 == 0:
                self._refine(requests, nodes, forward, other_tokens)
            if self._checking:
                self._check_after = min(2 * self._check_after, _LAST_CHECK)
            self._checking = False
            return
        self._unchecked += 1
        forward = self._refine(requests, nodes, forward, other_tokens) - self._other_seconds(
            requests, other_tokens
        )
        if self._off or self._checking:  # forced nodes while the drafter rests say nothing about it
            self._settle(sum(map(len, paths)) * plain / requests - draft - forward, plain)
            return
        draft = min(draft, 4.0 * requests * self._drafting or draft)
        self._track_drafting(draft / requests)
        self.calibration.learn(trees, paths)
        won = sum(map(len, paths)) * plain / requests - draft - forward
        self._settle(won, plain, self.risk * plain)

    def _track_drafting(self, seconds: float) -> None:
        """Follow the time of a draft; what made the first ones slow is forgotten soon."""
        self._drafts += 1
        falls = seconds < self._drafting
        rate = 1.0 if self._drafts == 1 else 0.5 if falls and self._drafts <= _EARLY else 0.1
        self._drafting += rate * (seconds - self._drafting)

    def charge(self, seconds: float) -> None:
        """See `Budget`."""
        self._settle(-seconds, self._at(1))

    def _settle(self, won: float, plain: float, allowance: float = 0.0) -> None:
        """Enter the seconds that drafting won in a pass, and those that the pass lets it lose."""
        self._saved += won
        self._worst = min(self._worst, self._saved)
        self._balance = min(self._balance + won + allowance, self.reserve * plain)

    def seconds(self, size: ArrayLike) -> NDArray[np.float64]:
        """Return T(n) as corrected by passes, continued linearly beyond the largest size."""
        sizes = np.asarray(size, np.float64)
        return self._curve.each(sizes.reshape(-1)).reshape(sizes.shape)

    def _at(self, size: float) -> float:
        return self._curve.at(size)

    def _other_seconds(self, requests: int, other_tokens: int) -> float:
        """Return the seconds that `other_tokens` add to a pass of the roots; no cost of drafts."""
        return self._at(requests + other_tokens) - self._at(requests) if other_tokens else 0.0

    def _refine(self, requests: int, nodes: int, forward: float, other_tokens: int) -> float:
        """Correct T(n) by a measured pass, most at its own size; return its time without outliers.

        Other load on the machine slows all sizes, so all of the curve follows a little. A pass that
        was interrupted counts at most twice the expected time. One with parts of prompts, which
        have other rows and sequences, does not correct the curve.
        """
        expected = self._at(nodes + other_tokens)
        forward = min(forward, 2.0 * expected)
        if not other_tokens and self._curve.correct(nodes, max(forward / expected, 0.1)):
            self._reconsider(requests if nodes == requests else 0)
        return forward

    def _reconsider(self, requests: int) -> None:
        """Forget what was decided by a curve that has turned out wrong.

        If it was that of plain passes of `requests`, the ledger was wrong, too; 0: it was not.
        """
        self._resting, self._next_rest = 0, self.rest
        if self._sizes_itself:
            self.max_nodes = _largest_useful(self.measured())
        if requests:
            self._balance = max(self._balance, self._at(requests))

    def report(self) -> dict[str, object]:
        """Return what it did and why; `docs/reference/bench-json.md` has the fields."""
        return {
            "reason": self._reason(),
            "passes": self.passes,
            "plain_passes": self.plain_passes,
            "probes": self.probes,
            "sizes": {str(n): self.sizes[n] for n in sorted(self.sizes)},
            "draft_seconds": self._drafting,
            "pass_seconds": dict(zip(map(str, self.cost.nodes), self._curve.seconds, strict=True)),
            "balance_seconds": self._balance,
            "saved_seconds": self._saved,
            "regret_seconds": -self._worst,
        }

    def _reason(self) -> str:
        """Return why the next pass would be plain, or else what the last tree promised."""
        if not self.max_nodes:
            two = self._at(2) / self._at(1)
            return f"plain: no tree can pay, 2 nodes cost {two:.2f} plain passes"
        if self._balance < 0:
            return "plain: drafting has lost all the time that it may for now"
        if self._last is None:
            return "plain: no tree was drafted yet"
        ranking, first, more = self._last
        requests = len(ranking.sizes)
        tokens = np.array(ranking.tokens) / requests
        passes = self.seconds(first + np.arange(len(tokens))) + more
        costs = passes / self._at(requests)
        if len(tokens) == 1:
            return ("plain" if self._resting else "drafting") + ": the drafter proposed nothing"
        best = 1 + int(np.argmax(tokens[1:] / costs[1:]))
        promise = f"best expected {tokens[best]:.2f} tokens for {costs[best]:.2f} of the cost"
        if tokens[best] > costs[best]:
            return f"drafting: {promise}"
        return f"plain: no tree pays, {promise}"


def governor_of(engine: Engine, cost: Cost) -> Governor:
    """Return a governor of passes of an engine with this T(n)."""
    return Governor(cost, reserve=_REMOTE_RESERVE) if engine.remote_layers else Governor(cost)


def _largest_useful(cost: Cost) -> int:
    """Return the nodes below the root at which even a chain of accepted nodes stops to pay."""
    useful = [n for n in cost.nodes if n * cost.at(1) > cost.at(n)]
    return min(max(useful, default=1), _MOST_NODES) - 1

"""Drafters for concurrent requests: one each, that learn together, and trees sized together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from paceline.core import Cost, Floats, TokenTree
from paceline.decoding.governor import Governor
from paceline.decoding.run import Run
from paceline.decoding.walk import Walked
from paceline.drafters.base import Drafter, DraftMethod, Target
from paceline.errors import PacelineError


@dataclass(eq=False)
class Turn:
    """What a run does in a pass.

    Attributes:
        id: names the request.
        run: the request.
        budget: most nodes beyond the root; None leaves it to the governor.
        tree: what is run for it.
        walked: what was drawn.
        texts: that each token made certain.
        said: tokens of the output before.
        error: what went wrong with this request alone.
    """

    id: str
    run: Run
    budget: int | None = None
    tree: TokenTree = field(default_factory=lambda: TokenTree.root(0))
    walked: Walked | None = None
    texts: list[str] = field(default_factory=list)
    said: int = 0
    error: PacelineError | None = None


class Lanes:
    """The drafters of one method, and the governor of all their trees.

    Args:
        method: the drafters' settings.
        target: whom they guess for.
        cost: T(n) of its passes.
        first: a drafter that is there already.
    """

    def __init__(
        self, method: DraftMethod, target: Target, cost: Cost, first: Drafter | None = None
    ) -> None:
        self.governor = Governor(cost)
        self._method, self._target = method, target
        self._first = first or method.build(target)
        self._free = [self._first]
        self._seconds = 0.0  # of drafting in the pass under way

    def take(self) -> Drafter:
        """A drafter that no other request uses; the one that was used last comes first."""
        if self._free:
            return self._free.pop()
        return self._first.beside() or self._method.build(self._target)

    def give(self, drafter: Drafter) -> None:
        """A request is done with its drafter; what it learnt stays."""
        self._free.append(drafter)

    def draft(self, turns: Sequence[Turn], most: int, riding: int) -> None:
        """Let the drafters guess, and keep what is worth running.

        Args:
            turns: of requests with drafters from here; their trees are set.
            most: nodes that a tree may have, its root included.
            riding: nodes of others in the same pass.
        """
        governed = [turn for turn in turns if turn.budget is None]
        asked = self.governor.ask(len(governed)) if governed else 0
        start = perf_counter()
        for turn in turns:
            wished = asked if turn.budget is None else turn.budget
            spare = self.governor.spare() if turn.budget is None and not asked else 0
            try:
                turn.tree = turn.run.propose(min(wished, most - 1), min(spare, most - 1))
            except PacelineError as error:
                turn.error = error
        self._seconds = perf_counter() - start
        governed = [turn for turn in governed if not turn.error]
        if asked and governed:
            riding += sum(len(turn.tree) for turn in turns if turn.budget is not None)
            trees = [turn.tree for turn in governed]
            kept = self.governor.choose(trees, self._seconds, riding)
            for turn, tree in zip(governed, kept, strict=True):
                turn.tree = tree
        elif not asked:
            self._seconds = 0.0

    def take_in(self, turns: Sequence[Turn], logits: Sequence[Floats]) -> None:
        """Walk each tree over its logits, and let the drafters learn."""
        for turn, rows in zip(turns, logits, strict=True):
            try:
                turn.walked = turn.run.take(turn.tree, rows)
                start = perf_counter()
                turn.run.learn(turn.tree, rows, turn.walked)
                self._seconds += (perf_counter() - start) * (self._seconds > 0)
                turn.texts = turn.run.accept(turn.tree, turn.walked)
            except PacelineError as error:
                turn.error = error

    def settle(self, turns: Sequence[Turn], seconds: float, nodes: int) -> float:
        """Tell the governor of a pass of so many nodes; returns the seconds of drafting."""
        governed = [
            (turn.tree, turn.walked.path) for turn in turns if _governed(turn) and turn.walked
        ]
        if governed:
            trees, paths = zip(*governed, strict=True)
            riding = nodes - sum(map(len, trees))
            self.governor.record(trees, paths, self._seconds, seconds, riding)
        return self._seconds


def _governed(turn: Turn) -> bool:
    return turn.budget is None and not turn.error

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
from paceline.errors import MemoryFullError

_NONE = TokenTree.root(0)


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
        seconds: that its guesses cost.
        error: what went wrong with this request alone.
    """

    id: str
    run: Run
    budget: int | None = None
    tree: TokenTree = _NONE
    walked: Walked | None = None
    texts: list[str] = field(default_factory=list)
    said: int = 0
    seconds: float = 0.0
    error: Exception | None = None


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
        self.first = first or method.build(target)
        self._free = [self.first]
        self._asked = 0  # nodes, in the pass under way

    def take(self) -> Drafter:
        """A drafter that no other request uses; the one that was used last comes first."""
        if self._free:
            return self._free.pop()
        return self.first.beside() or self._method.build(self._target)

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
        self._asked = asked = self.governor.ask(len(governed)) if governed else 0
        for turn in turns:
            start = perf_counter()
            wished = asked if turn.budget is None else turn.budget
            spare = self.governor.spare() if turn.budget is None and not asked else 0
            least = self.governor.least() if turn.budget is None else 0.0
            try:
                turn.tree = turn.run.propose(min(wished, most - 1), min(spare, most - 1), least)
            except MemoryFullError:  # drafting needs room, too; the pass can do without
                turn.tree = TokenTree.root(int(turn.run.text[-1]))
            except Exception as error:
                turn.error = error
            turn.seconds = perf_counter() - start
        governed = [turn for turn in governed if not turn.error]
        if asked and governed:
            riding += sum(len(turn.tree) for turn in turns if turn.budget is not None)
            trees = [turn.tree for turn in governed]
            kept = self.governor.choose(trees, sum(turn.seconds for turn in governed), riding)
            for turn, tree in zip(governed, kept, strict=True):
                turn.tree = tree

    def take_in(self, turns: Sequence[Turn], logits: Sequence[Floats]) -> None:
        """Walk each tree over its logits, and let the drafters learn."""
        for turn, rows in zip(turns, logits, strict=True):
            try:
                turn.walked = turn.run.take(turn.tree, rows)
                start = perf_counter()
                turn.run.learn(turn.tree, rows, turn.walked)
                turn.seconds += perf_counter() - start
                turn.texts = turn.run.accept(turn.tree, turn.walked)
            except Exception as error:
                turn.error = error

    def settle(self, turns: Sequence[Turn], seconds: float, nodes: int) -> None:
        """Tell the governor of a pass of so many nodes."""
        governed = [
            (turn.tree, turn.walked.path, turn.seconds)
            for turn in turns
            if turn.budget is None and turn.walked and not turn.error
        ]
        if governed:
            trees, paths, drafting = zip(*governed, strict=True)
            riding = nodes - sum(map(len, trees))
            draft = sum(drafting) if self._asked else 0.0
            self.governor.record(trees, paths, draft, seconds, riding)

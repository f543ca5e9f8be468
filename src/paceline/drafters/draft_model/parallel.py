"""PEARL: a draft model goes on drafting, in a thread of its own, while the target verifies."""

from __future__ import annotations

from threading import Event, Thread

from paceline.core import Tokens
from paceline.drafters.draft_model.tree_growth import (
    GrowingTree,
    GrownTree,
    GrowthLimits,
    Judge,
    Run,
)
from paceline.errors import MemoryFullError

_AHEAD = 3  # times the budget: nodes that the draft may hold, those under verification among them


class ParallelDrafter:
    """Grows one tree on and on; what is verified becomes its root.

    Based on Liu et al., PEARL, arXiv 2408.11850 (catalogue 52), with trees for chains. Where
    nothing is known below the new root, one pass finds its successors, and the target verifies
    them while drafting goes on (pre-verify). Where the draft foresaw what the target drew, the
    subtree there is the next proposal, without any waiting (post-verify).

    Only one thread touches the tree and the draft at a time: whoever calls must call `stop` before
    using anything that the passes use. A thread ends by itself after a bounded number of passes.

    Args:
        wait: passes that a proposal waits for at most, one less where the root was foreseen.
    """

    def __init__(self, wait: int) -> None:
        self._wait = wait
        self._thread: Thread | None = None
        self._enough = Event()
        self._error: BaseException | None = None
        self._growing: GrowingTree | None = None
        self._length = 0  # of the context that ends with the tree's root

    def stop(self) -> None:
        """Wait until the pass under way is over.

        Raises:
            BaseException: what ended the drafting since the last call.
        """
        if self._thread is not None:
            self._enough.set()
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._growing = None
            raise error

    def forget(self) -> None:
        """Stop, and drop the tree: another text begins."""
        self._growing = None
        self.stop()
        self._growing = None

    def grow(self, context: Tokens, limits: GrowthLimits, run: Run, judge: Judge) -> GrownTree:
        """What is known below `context[-1]`, after as many passes as it waits for; then go on.

        `context` [S] must not change afterwards.
        """
        budget, width, most, levels, more = limits
        growing = self._below(context)
        passes = int(growing.begun())  # one that need not be waited for
        frontier = growing.frontier(budget, width, levels)
        while frontier and passes < self._wait:
            if passes and not more(passes, growing.reach(frontier)):
                break
            growing.step(frontier, run, judge)
            passes += 1
            frontier = growing.frontier(budget, width, levels)
        growth = growing.growth(budget)
        if not growing.begun():
            return growth
        self._growing, self._length = growing, len(context)

        def go_on() -> None:
            try:
                for _ in range(most):
                    frontier = growing.frontier(_AHEAD * budget, width, levels)
                    if not frontier or self._enough.is_set():
                        return
                    growing.step(frontier, run, judge)
            except MemoryFullError:  # the next proposal begins anew
                self._growing = None
            except BaseException as error:
                self._error = error

        self._enough.clear()
        self._thread = Thread(target=go_on, name="paceline-pearl")
        self._thread.start()
        return growth

    def _below(self, context: Tokens) -> GrowingTree:
        growing, self._growing = self._growing, None
        if growing is not None and len(context) >= self._length:
            found = growing.below(context[self._length :].tolist())
            if found is not None:
                return found
        return GrowingTree(int(context[-1]))

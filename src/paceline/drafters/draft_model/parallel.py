"""PEARL: a draft model continues drafting in a thread of its own while the target verifies."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Thread

from paceline.core import Tokens
from paceline.drafters.draft_model.tree_growth import (
    GrowingTree,
    GrownTree,
    GrowthLimits,
    Judge,
    Run,
)
from paceline.engines.native import NativeEngine
from paceline.errors import MemoryFullError

_AHEAD = 3  # times the budget: nodes that the tree may hold, those being verified included


class ParallelDrafter:
    """Grows one tree continuously; the node that was verified last becomes its root.

    Based on Liu et al., PEARL, arXiv 2408.11850 (catalogue 52), with trees for chains. If nothing
    is known below the new root, one pass finds its successors, and the target verifies them while
    drafting continues (pre-verify). If the tree already contains what the target drew, the subtree
    there is the next proposal, without any waiting (post-verify).

    Only one thread touches the tree and the draft model at a time: call `stop` before using
    anything that the passes use. A thread ends by itself after a bounded number of passes.

    Beside the target the draft model runs on one thread; what is waited for takes all of them.

    Args:
        wait: most passes that a proposal waits for, counting one that has already run.
        engines: run the draft model.
    """

    def __init__(self, wait: int, engines: Sequence[NativeEngine] = ()) -> None:
        self._wait = wait
        self._engines = [(engine, engine.threads) for engine in engines]
        self._thread: Thread | None = None
        self._enough = Event()
        self._error: BaseException | None = None
        self._growing: GrowingTree | None = None
        self._length = 0  # of the context whose last token is the tree's root

    def stop(self) -> None:
        """Stop drafting, and wait until the current pass has ended.

        Raises:
            BaseException: what ended the thread since the last call.
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
        """Stop, and drop the tree, as another text begins."""
        self._growing = None
        self.stop()
        self._growing = None

    def take_threads(self) -> None:
        """Give the draft model all its threads until drafting goes on beside the target."""
        for engine, threads in self._engines:
            engine.threads = threads

    def grow(self, context: Tokens, limits: GrowthLimits, run: Run, judge: Judge) -> GrownTree:
        """Return the tree below `context[-1]` after at most `wait` passes, and continue drafting.

        `context` [S] must not change afterwards.
        """
        budget, width, most, levels, more = limits
        growing = self._below(context)
        passes = int(growing.begun())  # one pass that need not be waited for
        frontier = growing.frontier(budget, width, levels)
        while frontier and passes < self._wait:
            if passes and not more(passes, growing.reach(frontier)):
                break
            self.take_threads()
            growing.step(frontier, run, judge)
            passes += 1
            frontier = growing.frontier(budget, width, levels)
        growth = growing.growth(budget)
        if not growing.begun():
            return growth
        self._growing, self._length = growing, len(context)

        def continue_drafting() -> None:
            try:
                for _ in range(most):
                    frontier = growing.frontier(_AHEAD * budget, width, levels)
                    if not frontier or self._enough.is_set():
                        return
                    growing.step(frontier, run, judge)
            except MemoryFullError:  # the next proposal starts again
                self._growing = None
            except BaseException as error:
                self._error = error

        self._enough.clear()
        for engine, _ in self._engines:
            engine.threads = 1
        self._thread = Thread(target=continue_drafting, name="paceline-pearl")
        self._thread.start()
        return growth

    def _below(self, context: Tokens) -> GrowingTree:
        growing, self._growing = self._growing, None
        if growing is not None and len(context) >= self._length:
            subtree = growing.below(context[self._length :].tolist())
            if subtree is not None:
                return subtree
        return GrowingTree(int(context[-1]))

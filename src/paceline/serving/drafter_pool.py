"""Pools of drafters: one drafter for each running request, trees sized together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from paceline.core import Cost, TokenTree
from paceline.decoding.governor import Governor, governor_of
from paceline.decoding.session import Session
from paceline.drafters.base import Drafter, DraftMethod, ModelBacked, Target, engines_of
from paceline.drafters.history.warm_start import replay
from paceline.drafters.plain import Plain
from paceline.engines.base import Engine
from paceline.engines.screened import Logits
from paceline.errors import MemoryFullError
from paceline.registry import drafters
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import Job
from paceline.serving.pass_budget import relative_cost

if TYPE_CHECKING:
    from paceline.lm import LM
    from paceline.models.trace import Trace


_METHODS = 8  # unused pools that are kept besides that of the model's own method


@dataclass(frozen=True)
class Decision:
    """How trees of a pass were sized.

    Attributes:
        wanted: nodes that the governor asked of each drafter for.
        decided: see `Governor.decided`.
    """

    wanted: int
    decided: tuple[bool, bool]


class DrafterPool:
    """The drafters of one method, which learn together, and the governor of their trees.

    Args:
        method: the drafters' settings.
        target: what the drafters propose tokens for.
        cost: T(n) of the target's passes.
        first: an existing drafter.
        memory: limits the KV caches of draft models; None leaves them unlimited.

    Attributes:
        idle: drafters that no request uses.

    Raises:
        PacelineError: a drafter cannot be built, or there is no memory for its models.
    """

    def __init__(
        self,
        method: DraftMethod,
        target: Target,
        cost: Cost,
        first: Drafter | None = None,
        memory: KVBudget | None = None,
    ) -> None:
        self.governor = governor_of(target.engine, cost) if target.engine else Governor(cost)
        self._method, self._target, self._memory = method, target, memory
        self.first = first or method.build(target)
        self._register(self.first, loaded=first is not None)
        self.idle = [self.first]
        self._no_drafts = Plain().build(target)
        self._decision = Decision(0, self.governor.decided)  # of the last pass

    def take(self) -> Drafter:
        """Return a drafter that no other request uses, the most recently used one first.

        If a new one would need a draft model of its own for which there is no memory, return a
        drafter that proposes nothing.
        """
        if self.idle:
            return self.idle.pop()
        drafter = self.first.fork()
        if drafter is not None:
            return drafter
        if self._memory and not self._memory.affords(engines_of(self.first)):
            return self._no_drafts
        return self._register(self._method.build(self._target))

    def give(self, drafter: Drafter) -> None:
        """Return a drafter to the pool; its learned state is kept."""
        if drafter is not self._no_drafts:
            self.idle.append(drafter)

    def learn(self, trace: Trace) -> None:
        """Let the drafters learn from what the model wrote, if they start warm; none is in use."""
        if getattr(self._method, "warm", False) and self.first in self.idle:
            replay(trace, self.first)

    def _register(self, drafter: Drafter, loaded: bool = False) -> Drafter:
        if self._memory is not None and isinstance(drafter, ModelBacked) and drafter.engines:
            drafter.release()
            self._memory.register(drafter.engines, drafts=True, loaded=loaded)
        return drafter

    def draft(
        self,
        entries: Sequence[BatchEntry],
        max_nodes: int,
        other_tokens: int,
        ready: Callable[[BatchEntry], bool] = lambda entry: True,
    ) -> Decision:
        """Let the drafters propose trees, and keep the nodes that are worth running.

        Args:
            entries: of requests with drafters from this pool; their `tree` is set.
            max_nodes: maximum nodes of a tree, root included.
            other_tokens: nodes and prompt tokens of other requests in the same pass.
            ready: lets a draft model catch up with the text; returns whether it has.

        Returns:
            what `record` takes.
        """
        governed = [entry for entry in entries if entry.budget is None]
        wanted = self.governor.nodes_wanted(len(governed)) if governed else 0
        for entry in entries:
            start = perf_counter()
            nodes = wanted if entry.budget is None else entry.budget
            forced = self.governor.nodes_for_forced() if entry.budget is None and not wanted else 0
            min_path_prob = self.governor.min_path_prob() if entry.budget is None else 0.0
            try:
                if (
                    nodes
                    and entry.run.levels
                    and (entry.run.drafter is self._no_drafts or not ready(entry))
                ):
                    entry.late, nodes = True, 0
                entry.tree = entry.run.propose(
                    min(nodes, max_nodes - 1), min(forced, max_nodes - 1), min_path_prob
                )
            except MemoryFullError:  # drafting needs memory too; the pass does without
                entry.tree = TokenTree.root(int(entry.run.text[-1]))
            except Exception as error:
                entry.error = error
            entry.seconds = perf_counter() - start
        governed = [entry for entry in governed if not entry.error and not entry.late]
        if wanted and governed:
            others = [entry for entry in entries if entry not in governed and not entry.error]
            other_tokens += sum(len(entry.tree) for entry in others)
            trees = [entry.tree for entry in governed]
            kept = self.governor.prune(
                trees, sum(entry.seconds for entry in governed), other_tokens
            )
            for entry, tree in zip(governed, kept, strict=True):
                entry.tree = tree
        self._decision = Decision(wanted, self.governor.decided)
        return self._decision

    def commit(self, entries: Sequence[BatchEntry], logits: Sequence[Logits]) -> None:
        """Walk each tree over its logits, and let the drafters learn from the result."""
        for entry, rows in zip(entries, logits, strict=True):
            try:
                entry.walked = entry.run.verify(entry.tree, rows)
                start = perf_counter()
                entry.run.learn(entry.tree, rows, entry.walked)
                entry.seconds += perf_counter() - start
                entry.texts = entry.run.accept(entry.tree, entry.walked)
            except Exception as error:
                entry.error = error

    def record(
        self,
        entries: Sequence[BatchEntry],
        seconds: float,
        nodes: int,
        decision: Decision | None = None,
    ) -> None:
        """Report a pass to the governor.

        Args:
            entries: of this pool, after `commit`.
            seconds: that the pass took.
            nodes: that it had, those of other requests included.
            decision: what `draft` returned for it; None: what it returned last.
        """
        decision = decision or self._decision
        governed = [
            (entry.tree, entry.walked.path, entry.seconds)
            for entry in entries
            if entry.budget is None and entry.walked and not entry.error and not entry.late
        ]
        if governed:
            trees, paths, drafting = zip(*governed, strict=True)
            other_tokens = nodes - sum(map(len, trees))
            draft = sum(drafting) if decision.wanted else 0.0
            latest, self.governor.decided = self.governor.decided, decision.decided
            self.governor.record(trees, paths, draft, seconds, other_tokens)
            if decision is not self._decision:  # another pass was decided meanwhile
                self.governor.decided = latest


class DrafterPools:
    """A pool for each method that requests name; that of the model's own method always exists.

    Args:
        lm: the model, with its own method and drafter.
        cost: T(n) of its passes.
        memory: limits the KV caches of draft models.

    Attributes:
        configured: the pool of the model's own method.
        own: the pool of requests that name no method: the same, unless `switch` changed it.

    Raises:
        PacelineError: see `DrafterPool`.
    """

    def __init__(self, lm: LM, cost: Cost, memory: KVBudget) -> None:
        self._lm, self._cost, self._memory = lm, cost, memory
        method = lm.drafter_method
        self.configured = DrafterPool(method, lm.draft_target, cost, lm.drafter, memory)
        self.own = self.configured
        self._others: dict[DraftMethod, DrafterPool] = {}
        memory.idle = self.idle

    def of(self, drafter: str | None, used: Collection[DrafterPool]) -> DrafterPool:
        """Return the pool of a method, None being the model's own.

        A new pool may replace others that are not in `used`.

        Raises:
            PacelineError: there is no such method; or see `DrafterPool`.
        """
        if drafter is None:
            return self.own
        method = drafters.parse(drafter)
        if method == self._lm.drafter_method:
            return self.configured
        if method not in self._others:
            unused = [known for known, each in self._others.items() if each not in used]
            for known in unused[: max(len(self._others) + 1 - _METHODS, 0)]:
                del self._others[known]
            pool = DrafterPool(method, self._lm.draft_target, self._cost, memory=self._memory)
            self._others[method] = pool
        return self._others[method]

    def switch(self, method: DraftMethod, cost: Cost | None = None) -> None:
        """Let requests that name no method draft with another one, from now on.

        Args:
            method: an exact one that runs no models of its own.
            cost: T(n) from now on; None leaves it.
        """
        self._cost = cost or self._cost
        if method == self._lm.drafter_method:
            self.own = self.configured
        else:
            self.own = DrafterPool(method, self._lm.draft_target, self._cost, memory=self._memory)
        self.own.governor = governor_of(self._lm.engine, self._cost)

    def learn(self, trace: Trace) -> None:
        """Let the drafters of requests that name no method learn from what the model wrote."""
        self.own.learn(trace)

    def idle(self) -> Iterator[Drafter]:
        """Yield the drafters that no request uses."""
        for pool in dict.fromkeys((self.own, self.configured, *self._others.values())):
            yield from pool.idle


@dataclass(eq=False)
class Slot:
    """A submitted request; from its first pass to its end it has a drafter of its own.

    Attributes:
        job: as it was submitted.
        run: the request's session.
        pool: where its drafter comes from.
        drafter: None before its first pass.
        cached: prompt tokens that the prefix cache held when it was admitted.
        parked: its draft model's KV cache was dropped, and it runs without drafts for now.
        drafting: cost of a prompt token in its draft models, in tokens of the target.
        guiding: cost of a prompt token in its guides, in tokens of the target.
    """

    job: Job
    run: Session
    pool: DrafterPool
    drafter: Drafter | None = None
    cached: int = 0
    parked: bool = False
    drafting: float = 0.0
    guiding: float = 0.0

    def weigh(self, target: Engine) -> None:
        """Compute the costs of the request's draft models and guides relative to `target`."""
        held = [each for guide in self.run.guides for each in guide.positions(len(self.run.text))]
        self.guiding = sum(relative_cost(engine, target) for engine, size in held if size > 0)
        self.drafting = sum(
            relative_cost(engine, target) for engine in engines_of(self.run.drafter)
        )

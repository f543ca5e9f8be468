"""Drafters for concurrent requests: one each, that learn together, and trees sized together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from paceline.core import Cost, Floats, TokenTree
from paceline.decoding.governor import Governor
from paceline.decoding.session import Session
from paceline.drafters.base import Drafter, DraftMethod, ModelBacked, Target, engines_of
from paceline.drafters.plain import Plain
from paceline.engines.base import Engine
from paceline.errors import MemoryFullError
from paceline.registry import drafters
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import Job
from paceline.serving.pass_budget import price

if TYPE_CHECKING:
    from paceline.lm import LM

_METHODS = 8  # of drafters besides the model's own that are kept while nobody uses them


class DrafterPool:
    """The drafters of one method, and the governor of all their trees.

    Args:
        method: the drafters' settings.
        target: whom they guess for.
        cost: T(n) of its passes.
        first: a drafter that is there already.
        memory: keeps what their models hold; None lets them take what they want.

    Attributes:
        idle: drafters that no request uses.

    Raises:
        PacelineError: a drafter cannot be built, or its models have no room.
    """

    def __init__(
        self,
        method: DraftMethod,
        target: Target,
        cost: Cost,
        first: Drafter | None = None,
        memory: KVBudget | None = None,
    ) -> None:
        self.governor = Governor(cost)
        self._method, self._target, self._memory = method, target, memory
        self.first = first or method.build(target)
        self._known(self.first, loaded=first is not None)
        self.idle = [self.first]
        self._mute = Plain().build(target)
        self._asked = 0  # nodes, in the pass under way

    def take(self) -> Drafter:
        """A drafter that no other request uses; the one that was used last comes first.

        Where it would need a model of its own, and there is no room, one that guesses nothing.
        """
        if self.idle:
            return self.idle.pop()
        found = self.first.fork()
        if found is None and self._memory and not self._memory.affords(engines_of(self.first)):
            return self._mute
        if found is None:
            found = self._known(self._method.build(self._target))
        return found

    def give(self, drafter: Drafter) -> None:
        """A request is done with its drafter; what it learnt stays."""
        if drafter is not self._mute:
            self.idle.append(drafter)

    def _known(self, drafter: Drafter, loaded: bool = False) -> Drafter:
        if self._memory is not None and isinstance(drafter, ModelBacked) and drafter.engines:
            drafter.release()
            self._memory.know(drafter.engines, drafts=True, loaded=loaded)
        return drafter

    def draft(
        self,
        entries: Sequence[BatchEntry],
        most: int,
        other_tokens: int,
        ready: Callable[[BatchEntry], bool] = lambda entry: True,
    ) -> None:
        """Let the drafters guess, and keep what is worth running.

        Args:
            entries: of requests with drafters from here; their trees are set.
            most: nodes that a tree may have, its root included.
            other_tokens: nodes of others in the same pass.
            ready: lets a drafter catch up with the text; whether it has.
        """
        governed = [entry for entry in entries if entry.budget is None]
        self._asked = asked = self.governor.nodes_wanted(len(governed)) if governed else 0
        for entry in entries:
            start = perf_counter()
            wished = asked if entry.budget is None else entry.budget
            spare = self.governor.nodes_for_forced() if entry.budget is None and not asked else 0
            min_path_prob = self.governor.min_path_prob() if entry.budget is None else 0.0
            try:
                if (
                    wished
                    and entry.run.room
                    and (entry.run.drafter is self._mute or not ready(entry))
                ):
                    entry.late, wished = True, 0
                entry.tree = entry.run.propose(
                    min(wished, most - 1), min(spare, most - 1), min_path_prob
                )
            except MemoryFullError:  # drafting needs room, too; the pass can do without
                entry.tree = TokenTree.root(int(entry.run.text[-1]))
            except Exception as error:
                entry.error = error
            entry.seconds = perf_counter() - start
        governed = [entry for entry in governed if not entry.error and not entry.late]
        if asked and governed:
            others = [entry for entry in entries if entry not in governed and not entry.error]
            other_tokens += sum(len(entry.tree) for entry in others)
            trees = [entry.tree for entry in governed]
            kept = self.governor.prune(
                trees, sum(entry.seconds for entry in governed), other_tokens
            )
            for entry, tree in zip(governed, kept, strict=True):
                entry.tree = tree

    def take_in(self, entries: Sequence[BatchEntry], logits: Sequence[Floats]) -> None:
        """Walk each tree over its logits, and let the drafters learn."""
        for entry, rows in zip(entries, logits, strict=True):
            try:
                entry.walked = entry.run.verify(entry.tree, rows)
                start = perf_counter()
                entry.run.learn(entry.tree, rows, entry.walked)
                entry.seconds += perf_counter() - start
                entry.texts = entry.run.accept(entry.tree, entry.walked)
            except Exception as error:
                entry.error = error

    def settle(self, entries: Sequence[BatchEntry], seconds: float, nodes: int) -> None:
        """Tell the governor of a pass of so many nodes."""
        governed = [
            (entry.tree, entry.walked.path, entry.seconds)
            for entry in entries
            if entry.budget is None and entry.walked and not entry.error and not entry.late
        ]
        if governed:
            trees, paths, drafting = zip(*governed, strict=True)
            other_tokens = nodes - sum(map(len, trees))
            draft = sum(drafting) if self._asked else 0.0
            self.governor.record(trees, paths, draft, seconds, other_tokens)


class DrafterPools:
    """The lanes of every method that a request names; those of the model's own are always there.

    Args:
        lm: the model, and its own method and drafter.
        cost: T(n) of its passes.
        memory: keeps what the drafters' models hold.

    Raises:
        PacelineError: as `DrafterPool`.
    """

    def __init__(self, lm: LM, cost: Cost, memory: KVBudget) -> None:
        self._lm, self._cost, self._memory = lm, cost, memory
        self.own = DrafterPool(lm.drafter_method, lm.draft_target, cost, lm.drafter, memory)
        self._others: dict[DraftMethod, DrafterPool] = {}
        memory.idle = self.idle

    def of(self, drafter: str | None, used: Collection[DrafterPool]) -> DrafterPool:
        """The lanes of a method, which may take the place of some that are not used now.

        Raises:
            PacelineError: there is no such method, or as `DrafterPool`.
        """
        method = self._lm.drafter_method if drafter is None else drafters.parse(drafter)
        if method == self._lm.drafter_method:
            return self.own
        if method not in self._others:
            unused = [known for known, each in self._others.items() if each not in used]
            for known in unused[: max(len(self._others) + 1 - _METHODS, 0)]:
                del self._others[known]
            pool = DrafterPool(method, self._lm.draft_target, self._cost, memory=self._memory)
            self._others[method] = pool
        return self._others[method]

    def idle(self) -> Iterator[Drafter]:
        """Drafters that no request uses."""
        for pool in (self.own, *self._others.values()):
            yield from pool.idle


@dataclass(eq=False)
class Slot:
    """A request that was handed in; from its first pass to its end it has a drafter of its own.

    Attributes:
        job: what was handed in.
        run: the request at work.
        pool: where its drafter is from.
        drafter: None before its first pass.
        cached: tokens known from before when it got its place.
        parked: its draft had to give its memory up, and does without for now.
        drafting: what its drafts take to read a token, in tokens of the model.
        guiding: likewise its guides.
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
        """Find out what its drafts and guides take beside `target`."""
        held = [each for guide in self.run.guides for each in guide.positions(len(self.run.text))]
        self.guiding = sum(price(engine, target) for engine, size in held if size > 0)
        self.drafting = sum(price(engine, target) for engine in engines_of(self.run.drafter))

"""Runs what belongs to a pass: trees, and texts for drafts and guides; finds memory for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paceline.core import Floats
from paceline.decoding.session import give_hidden
from paceline.drafters.base import ModelBacked
from paceline.engines.base import Engine
from paceline.errors import MemoryFullError, PacelineError
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import Slot
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import WorkerStats
from paceline.serving.pass_budget import PassBudget
from paceline.serving.scheduler import Scheduler


class PassRunner:
    """Runs turns; what goes wrong with one stops no other.

    Args:
        engine: runs the model.
        scheduler: is told who had to give its memory up.
        memory: is asked who yields.
        max_running: requests by their names, as the worker keeps them.
        stats: counts.

    Attributes:
        give_way: lets a search yield; whether one did.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        memory: KVBudget,
        slots: dict[str, Slot],
        stats: WorkerStats,
    ) -> None:
        self._engine, self._scheduler, self._memory = engine, scheduler, memory
        self._slots, self._stats = slots, stats
        self.give_way: Callable[[], bool] = lambda: False

    def make_room(self, parts: list[BatchEntry], entries: list[BatchEntry], nodes: int) -> None:
        """Before anything is run: let the model, drafts and guides find what they will need."""
        wanted = [(part, len(part.tree)) for part in parts] + [(entry, nodes) for entry in entries]
        slots = [(self._slots[entry.id], entry.run, more) for entry, more in wanted]
        self._memory.make_room(
            [(run, more, None if slot.parked else slot.drafter) for slot, run, more in slots]
        )

    def read(
        self, parts: list[BatchEntry], entries: list[BatchEntry], pass_budget: PassBudget
    ) -> list[BatchEntry]:
        """Let drafts and guides read along with parts of prompts; the turns that can have a tree.

        Those whose guides lack much of the text wait, and have these read what the pass can carry.
        """
        for part in parts:
            self._guide(part, len(part.tree))
            try:
                self._draft(self._slots[part.id], len(part.tree))
            except Exception as error:
                part.error = error
        lagging = [entry for entry in entries if self._lags(entry)]
        for entry in lagging:
            cost = self._slots[entry.id].guiding
            pass_budget.spend(self._guide(entry, pass_budget.must(cost)), cost)
        return [entry for entry in entries if entry not in lagging]

    def follow(self, pass_budget: PassBudget, entry: BatchEntry) -> bool:
        """Let a draft catch up with the text, before it guesses; whether it has."""
        slot = self._slots[entry.id]
        if not slot.drafting:
            return True
        pass_budget.spend(self._draft(slot, pass_budget.may(slot.drafting)), slot.drafting)
        drafter = entry.run.drafter
        return not isinstance(drafter, ModelBacked) or drafter.ready(entry.run.text)

    def look(self, entries: list[BatchEntry]) -> list[BatchEntry]:
        """Let the guides of each request run its tree; those whose guides have."""
        return [entry for entry in entries if self._looked(entry)]

    def forward(self, entries: list[BatchEntry]) -> dict[str, Floats]:
        """The logits of each turn; of those that had to give their memory up, none."""
        while entries := [entry for entry in entries if entry.run.sequence and not entry.error]:
            rows = [
                entry.run.wants_prefill_logits if entry.run.missing else True for entry in entries
            ]
            batch = [(entry.run.sequence, entry.tree) for entry in entries if entry.run.sequence]
            try:
                logits = self._engine.forward(batch, rows)
            except MemoryFullError as error:
                self._relieve(entries[0], error)
            except PacelineError as error:
                self._blame(entries, error)
            else:
                sizes = [len(t.tree) * shown for t, shown in zip(entries, rows, strict=True)]
                split = np.split(logits, np.cumsum(sizes)[:-1])
                give_hidden(self._engine, [entry.run for entry in entries], sizes)
                return {entry.id: part for entry, part in zip(entries, split, strict=True)}
        return {}

    def yields(self) -> bool:
        """Give memory up for a search; or those that run may yet end."""
        return self._spared(1) or bool(self._scheduler.running)

    def preempt(self, job_id: str) -> None:
        """Let a request give its memory up, and wait again."""
        self._slots[job_id].run.close()
        if self._scheduler.jobs[job_id].stage != "waiting":
            self._scheduler.preempt(job_id)
        self._stats.preempted += 1

    def _looked(self, entry: BatchEntry) -> bool:
        while (
            entry.run.sequence and not entry.error and not (entry.run.guides and self._lags(entry))
        ):
            try:
                entry.run.run_guides(entry.tree)
                return True
            except MemoryFullError as error:
                self._relieve(entry, error)
            except Exception as error:
                entry.error = error
        return False

    def _lags(self, entry: BatchEntry) -> bool:
        """Whether its guides lack too much for a tree."""
        try:
            return entry.run.guide_lag > 0
        except Exception as error:
            entry.error = error
        return True

    def _guide(self, entry: BatchEntry, most: int) -> int:
        """Let guides read up to so many tokens; how many they did."""
        try:
            return entry.run.advance_guides(most) if entry.run.sequence and not entry.error else 0
        except MemoryFullError as error:
            self._relieve(entry, error)
        except Exception as error:
            entry.error = error
        return 0

    def _draft(self, slot: Slot, most: int) -> int:
        """Let a draft read up to so many tokens; how many it did."""
        drafter = slot.run.drafter
        if not slot.drafting or not isinstance(drafter, ModelBacked):
            return 0
        try:
            return drafter.follow(slot.run.text, 0 if slot.parked else most)
        except MemoryFullError:
            if not self._memory.ease(1):
                self._park(slot)
        return 0

    def _park(self, slot: Slot) -> bool:
        """Let a draft give its memory up until another request is over; whether it had any."""
        if slot.parked or slot.drafter is None:
            return False
        slot.parked = True
        return self._memory.park(slot.drafter)

    def _relieve(self, entry: BatchEntry, error: MemoryFullError) -> None:
        """Let a turn have more memory: of the least important one that can yield."""
        running = self._scheduler.running
        if self._spared(len(running)):
            return
        if len(running) > 1:
            self.preempt(running[-1].id)
        elif not self.give_way():
            entry.error = error

    def _spared(self, pages: int) -> bool:
        """Whether texts of the past, or drafts, gave memory up for about so many pages."""
        running = reversed(self._scheduler.running)
        return self._memory.ease(pages) or any(self._park(self._slots[job.id]) for job in running)

    def _blame(self, entries: list[BatchEntry], error: PacelineError) -> None:
        """Find out whose tree a pass was refused for: the others are run without it."""
        for entry in entries:
            assert entry.run.sequence is not None
            try:
                self._engine.forward([(entry.run.sequence, entry.tree)], "none")
            except Exception as own:
                entry.error = own
        if not any(entry.error for entry in entries):
            for entry in entries:
                entry.error = error

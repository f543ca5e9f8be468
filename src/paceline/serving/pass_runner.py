"""Runs the model, draft models and guides of a pass, and reclaims memory when it runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from paceline.decoding.session import give_hidden
from paceline.drafters.base import ModelBacked
from paceline.engines.base import Engine
from paceline.engines.screened import Logits, split_logits
from paceline.errors import MemoryFullError, PacelineError
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.batch_pass import StartedPass
from paceline.serving.drafter_pool import Slot
from paceline.serving.kv_budget import KVBudget
from paceline.serving.messages import WorkerStats
from paceline.serving.pass_budget import PassBudget
from paceline.serving.scheduler import Scheduler


class PassRunner:
    """Runs batch entries; a failure of one does not stop the others.

    Args:
        engine: runs the model.
        scheduler: is notified of preemptions.
        memory: decides what is evicted.
        slots: all requests by id, shared with the worker.
        stats: counters, updated here.

    Attributes:
        give_way: preempts one running search; returns whether one was preempted.
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

    def make_room(
        self,
        parts: list[BatchEntry],
        entries: list[BatchEntry],
        nodes: int,
        waiting: Iterable[BatchEntry] = (),
    ) -> None:
        """Reclaim the memory that the model, draft models and guides will need in this pass.

        Args:
            parts: parts of prompts.
            entries: requests that get a tree.
            nodes: maximum nodes of each tree.
            waiting: of passes under way, which need memory for what they run, too.
        """
        sizes = [(part, len(part.tree)) for part in [*parts, *waiting]]
        sizes += [(entry, nodes) for entry in entries]
        slots = [(self._slots[entry.id], entry.run, size) for entry, size in sizes]
        self._memory.make_room(
            [(run, size, None if slot.parked else slot.drafter) for slot, run, size in slots]
        )

    def prefill_models(
        self, parts: list[BatchEntry], entries: list[BatchEntry], pass_budget: PassBudget
    ) -> list[BatchEntry]:
        """Let draft models and guides read prompt parts; return the entries that can have a tree.

        Entries whose guides lag far behind the text skip the pass; these guides read what it can
        carry.
        """
        for part in parts:
            self._prefill_guides(part, len(part.tree))
            slot = self._slots[part.id]
            if part.budget is None and slot.pool.governor.resting:
                continue  # its draft model catches up when it is asked again
            try:
                self._prefill_drafter(slot, len(part.tree))
            except Exception as error:
                part.error = error
        lagging = [entry for entry in entries if self._lags(entry)]
        for entry in lagging:
            cost = self._slots[entry.id].guiding
            pass_budget.spend(self._prefill_guides(entry, pass_budget.min_allowance(cost)), cost)
        return [entry for entry in entries if entry not in lagging]

    def catch_up(self, pass_budget: PassBudget, entry: BatchEntry) -> bool:
        """Let a draft model catch up with the text; return whether it has."""
        slot = self._slots[entry.id]
        if not slot.drafting:
            return True
        pass_budget.spend(
            self._prefill_drafter(slot, pass_budget.allowance(slot.drafting)), slot.drafting
        )
        drafter = entry.run.drafter
        return not isinstance(drafter, ModelBacked) or drafter.ready(entry.run.text)

    def run_guides(self, entries: list[BatchEntry]) -> list[BatchEntry]:
        """Let the guides of each request run its tree; return the entries whose guides have."""
        return [entry for entry in entries if self._run_guides_of(entry)]

    def begin(self, entries: list[BatchEntry]) -> StartedPass:
        """Begin a pass, if the engine runs several at once; see `finish`."""
        entries = [entry for entry in entries if entry.run.sequence and not entry.error]
        started = StartedPass(entries, [entry.run.active for entry in entries])
        if self._engine.passes_in_flight > 1 and entries:
            batch = [(entry.run.active, entry.tree) for entry in entries if entry.run.active]
            try:
                started.started = self._engine.begin(batch, _rows(entries))
            except PacelineError:
                started.started = None  # `finish` runs it, and finds out whose fault it is
        return started

    def finish(self, begun: StartedPass) -> dict[str, Logits]:
        """Return the logits of each entry by id, as `forward` does, of a pass that was begun.

        Requests that were preempted or have ended since are left out.
        """
        kept = begun.kept()
        entries = [entry for entry, still in zip(begun.entries, kept, strict=True) if still]
        if begun.started is None:
            return self.forward(entries)
        if not entries:
            self._engine.abandon(begun.started)
            return {}
        try:
            logits = self._engine.finish(begun.started, kept)
        except MemoryFullError as error:
            self._reclaim_for(entries[0], error)
        except PacelineError:
            pass  # run once more, to find out whose fault it is
        else:
            return self._split(entries, _rows(entries), logits)
        return self.forward(entries)

    def abandon(self, begun: StartedPass) -> None:
        """Give up a pass that was begun."""
        if begun.started is not None:
            self._engine.abandon(begun.started)

    def forward(self, entries: list[BatchEntry]) -> dict[str, Logits]:
        """Return the logits of each entry by id; preempted requests are left out.

        The head may be read in part if every entry can do with that.
        """
        while entries := [entry for entry in entries if entry.run.sequence and not entry.error]:
            rows = _rows(entries)
            batch = [(entry.run.active, entry.tree) for entry in entries if entry.run.active]
            try:
                screened = all(map(self._can_screen, entries))
                forward = self._engine.forward_screened if screened else self._engine.forward
                logits = forward(batch, rows)
            except MemoryFullError as error:
                self._reclaim_for(entries[0], error)
            except PacelineError as error:
                self._find_faulty(entries, error)
            else:
                return self._split(entries, rows, logits)
        return {}

    def load_documents(self, entry: BatchEntry) -> None:
        """Put the stored documents of a request into its sequence."""
        while entry.run.sequence and not entry.error:
            try:
                entry.run.load_documents()
                return
            except MemoryFullError as error:
                self._reclaim_for(entry, error)
            except Exception as error:
                entry.error = error

    def append_page(self, entry: BatchEntry, page: NDArray[np.uint8]) -> None:
        """Append a page that was computed elsewhere, uint8 [page_bytes], to a request's sequence.

        The request is preempted instead where others are more important and there is no room.
        """
        while entry.run.sequence and not entry.error:
            try:
                self._engine.append_page(entry.run.sequence, page)
                return
            except MemoryFullError as error:
                self._reclaim_for(entry, error)
            except Exception as error:
                entry.error = error

    def reclaim_for_search(self) -> bool:
        """Reclaim memory for a search; return False if that is in vain."""
        return self._reclaim(1) or bool(self._scheduler.running)

    def preempt(self, job_id: str) -> None:
        """Drop a request's KV cache and put it back into the queue."""
        self._slots[job_id].run.close()
        if self._scheduler.jobs[job_id].stage != "waiting":
            self._scheduler.preempt(job_id)
        self._stats.preempted += 1

    def _split(
        self, entries: list[BatchEntry], rows: list[bool], logits: Logits
    ) -> dict[str, Logits]:
        """Return the logits of each entry by id, and hand hidden states to who needs them."""
        sizes = [len(each.tree) * has for each, has in zip(entries, rows, strict=True)]
        give_hidden(self._engine, [entry.run for entry in entries], sizes)
        split = split_logits(logits, sizes)
        return {entry.id: part for entry, part in zip(entries, split, strict=True)}

    def _can_screen(self, entry: BatchEntry) -> bool:
        """Whether an entry needs only the logits of likely tokens; of a prompt coarse ones."""
        if entry.run.missing:
            return True
        return entry.run.can_screen and self._slots[entry.id].job.logprobs is None

    def _run_guides_of(self, entry: BatchEntry) -> bool:
        while (
            entry.run.sequence and not entry.error and not (entry.run.guides and self._lags(entry))
        ):
            try:
                entry.run.run_guides(entry.tree)
                return True
            except MemoryFullError as error:
                self._reclaim_for(entry, error)
            except Exception as error:
                entry.error = error
        return False

    def _lags(self, entry: BatchEntry) -> bool:
        """Return whether its guides lag too far behind for a tree."""
        try:
            return entry.run.guide_lag > 0
        except Exception as error:
            entry.error = error
        return True

    def _prefill_guides(self, entry: BatchEntry, max_tokens: int) -> int:
        """Let guides read up to `max_tokens` tokens; return how many they read."""
        try:
            return (
                entry.run.advance_guides(max_tokens)
                if entry.run.sequence and not entry.error
                else 0
            )
        except MemoryFullError as error:
            self._reclaim_for(entry, error)
        except Exception as error:
            entry.error = error
        return 0

    def _prefill_drafter(self, slot: Slot, max_tokens: int) -> int:
        """Let a draft model read up to `max_tokens` tokens; return how many it read."""
        drafter = slot.run.drafter
        if not slot.drafting or not isinstance(drafter, ModelBacked):
            return 0
        try:
            return drafter.follow(slot.run.text, 0 if slot.parked else max_tokens)
        except MemoryFullError:
            if not self._memory.ease(1):
                self._park(slot)
        return 0

    def _park(self, slot: Slot) -> bool:
        """Drop a draft model's KV cache until a request ends; return whether it had any."""
        if slot.parked or slot.drafter is None:
            return False
        slot.parked = True
        return self._memory.park(slot.drafter)

    def _reclaim_for(self, entry: BatchEntry, error: MemoryFullError) -> None:
        """Reclaim memory for an entry, at last by preempting the least important request."""
        running = self._scheduler.running
        if self._reclaim(len(running)):
            return
        if len(running) > 1:
            self.preempt(running[-1].id)
        elif not self.give_way():
            entry.error = error

    def _reclaim(self, pages: int) -> bool:
        """Evict cached prefixes or drafts for about `pages` pages; return whether any were."""
        running = reversed(self._scheduler.running)
        return self._memory.ease(pages) or any(self._park(self._slots[job.id]) for job in running)

    def _find_faulty(self, entries: list[BatchEntry], error: PacelineError) -> None:
        """Find the entry whose tree the engine refused; the others run without it."""
        for entry in entries:
            assert entry.run.active is not None
            try:
                self._engine.forward([(entry.run.active, entry.tree)], "none")
            except Exception as own:
                entry.error = own
        if not any(entry.error for entry in entries):
            for entry in entries:
                entry.error = error


def _rows(entries: list[BatchEntry]) -> list[bool]:
    """Return of each entry whether its logits are wanted."""
    return [entry.run.wants_prefill_logits if entry.run.missing else True for entry in entries]

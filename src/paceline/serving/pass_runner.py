"""Runs what belongs to a pass: trees, and texts for drafts and guides; finds memory for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paceline.core import Floats
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
        places: requests by their names, as the worker keeps them.
        stats: counts.

    Attributes:
        give_way: lets a search yield; whether one did.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        memory: KVBudget,
        places: dict[str, Slot],
        stats: WorkerStats,
    ) -> None:
        self._engine, self._scheduler, self._memory = engine, scheduler, memory
        self._places, self._stats = places, stats
        self.give_way: Callable[[], bool] = lambda: False

    def make_room(self, parts: list[BatchEntry], turns: list[BatchEntry], nodes: int) -> None:
        """Before anything is run: let the model, drafts and guides find what they will need."""
        wanted = [(part, len(part.tree)) for part in parts] + [(turn, nodes) for turn in turns]
        places = [(self._places[turn.id], turn.run, more) for turn, more in wanted]
        self._memory.make_room(
            [(run, more, None if place.parked else place.drafter) for place, run, more in places]
        )

    def read(
        self, parts: list[BatchEntry], turns: list[BatchEntry], reading: PassBudget
    ) -> list[BatchEntry]:
        """Let drafts and guides read along with parts of prompts; the turns that can have a tree.

        Those whose guides lack much of the text wait, and have these read what the pass can carry.
        """
        for part in parts:
            self._guide(part, len(part.tree))
            try:
                self._draft(self._places[part.id], len(part.tree))
            except Exception as error:
                part.error = error
        lagging = [turn for turn in turns if self._lags(turn)]
        for turn in lagging:
            cost = self._places[turn.id].guiding
            reading.spend(self._guide(turn, reading.must(cost)), cost)
        return [turn for turn in turns if turn not in lagging]

    def follow(self, reading: PassBudget, turn: BatchEntry) -> bool:
        """Let a draft catch up with the text, before it guesses; whether it has."""
        place = self._places[turn.id]
        if not place.drafting:
            return True
        reading.spend(self._draft(place, reading.may(place.drafting)), place.drafting)
        return turn.run.drafter.ready(turn.run.text)

    def look(self, turns: list[BatchEntry]) -> list[BatchEntry]:
        """Let the guides of each request run its tree; those whose guides have."""
        return [turn for turn in turns if self._looked(turn)]

    def forward(self, turns: list[BatchEntry]) -> dict[str, Floats]:
        """The logits of each turn; of those that had to give their memory up, none."""
        while turns := [turn for turn in turns if turn.run.sequence and not turn.error]:
            rows = [turn.run.wants_prefill_logits if turn.run.missing else True for turn in turns]
            batch = [(turn.run.sequence, turn.tree) for turn in turns if turn.run.sequence]
            try:
                logits = self._engine.forward(batch, rows)
            except MemoryFullError as error:
                self._relieve(turns[0], error)
            except PacelineError as error:
                self._blame(turns, error)
            else:
                sizes = [len(t.tree) * shown for t, shown in zip(turns, rows, strict=True)]
                split = np.split(logits, np.cumsum(sizes)[:-1])
                return {turn.id: part for turn, part in zip(turns, split, strict=True)}
        return {}

    def yields(self) -> bool:
        """Give memory up for a search; or those that run may yet end."""
        return self._spared(1) or bool(self._scheduler.running)

    def preempt(self, ask_id: str) -> None:
        """Let a request give its memory up, and wait again."""
        self._places[ask_id].run.close()
        if self._scheduler.jobs[ask_id].stage != "waiting":
            self._scheduler.preempt(ask_id)
        self._stats.preempted += 1

    def _looked(self, turn: BatchEntry) -> bool:
        while turn.run.sequence and not turn.error and not (turn.run.guides and self._lags(turn)):
            try:
                turn.run.run_guides(turn.tree)
                return True
            except MemoryFullError as error:
                self._relieve(turn, error)
            except Exception as error:
                turn.error = error
        return False

    def _lags(self, turn: BatchEntry) -> bool:
        """Whether its guides lack too much for a tree."""
        try:
            return turn.run.guide_lag > 0
        except Exception as error:
            turn.error = error
        return True

    def _guide(self, turn: BatchEntry, most: int) -> int:
        """Let guides read up to so many tokens; how many they did."""
        try:
            return turn.run.advance_guides(most) if turn.run.sequence and not turn.error else 0
        except MemoryFullError as error:
            self._relieve(turn, error)
        except Exception as error:
            turn.error = error
        return 0

    def _draft(self, place: Slot, most: int) -> int:
        """Let a draft read up to so many tokens; how many it did."""
        if not place.drafting:
            return 0
        try:
            return place.run.drafter.follow(place.run.text, 0 if place.parked else most)
        except MemoryFullError:
            if not self._memory.ease(1):
                self._park(place)
        return 0

    def _park(self, place: Slot) -> bool:
        """Let a draft give its memory up until another request is over; whether it had any."""
        if place.parked or place.drafter is None:
            return False
        place.parked = True
        return self._memory.park(place.drafter)

    def _relieve(self, turn: BatchEntry, error: MemoryFullError) -> None:
        """Let a turn have more memory: of the least important one that can yield."""
        running = self._scheduler.running
        if self._spared(len(running)):
            return
        if len(running) > 1:
            self.preempt(running[-1].id)
        elif not self.give_way():
            turn.error = error

    def _spared(self, pages: int) -> bool:
        """Whether texts of the past, or drafts, gave memory up for about so many pages."""
        running = reversed(self._scheduler.running)
        return self._memory.ease(pages) or any(self._park(self._places[job.id]) for job in running)

    def _blame(self, turns: list[BatchEntry], error: PacelineError) -> None:
        """Find out whose tree a pass was refused for: the others are run without it."""
        for turn in turns:
            assert turn.run.sequence is not None
            try:
                self._engine.forward([(turn.run.sequence, turn.tree)], "none")
            except Exception as own:
                turn.error = own
        if not any(turn.error for turn in turns):
            for turn in turns:
                turn.error = error

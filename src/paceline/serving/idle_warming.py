"""Warms a running server while it has no requests: the model answers prompts, drafters learn."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from paceline.errors import MemoryFullError, PacelineError
from paceline.models.trace import Trace, join_traces, trace_path, write_trace
from paceline.serving.messages import Job, JobEvent
from paceline.training.self_text import answer_steps

if TYPE_CHECKING:
    from paceline.serving.worker import Worker

TOKENS = 100_000  # as `paceline warm`
_KEPT_EVERY = 10_000  # tokens after which they are written to disk

_log = logging.getLogger("paceline.serving.warming")


class IdleWarming:
    """Lets the model answer prompts, a pass at a time, and keeps what `paceline warm` keeps.

    Drafters learn from each answer as soon as it is finished. Requests come first: one that
    arrives ends the answers that are being written, which are lost. An earlier trace of fewer
    tokens is continued.

    Args:
        worker: whose model and drafters are warmed; all calls are made in its thread.
        prompts: token ids of each.
        tokens: of answers, after which it is done.

    Attributes:
        written: tokens of finished answers, those of an earlier trace included.
    """

    def __init__(self, worker: Worker, prompts: Iterable[list[int]], tokens: int = TOKENS) -> None:
        self._worker, self._tokens = worker, tokens
        self._prompts = iter(prompts)
        self._steps: Generator[Trace | None, None, None] | None = None
        known = worker.lm.draft_target.trace
        if known is not None and not trace_path(worker.lm.model).is_file():
            known = None  # a shipped one, which knows fewer successors
        self._traces = [] if known is None else [known]
        self.written = self._on_disk = sum(map(len, self._traces))
        self._rounds = self.written  # seeds differ from those of earlier rounds
        if not self.done:
            _log.info("%d of %d tokens of a warm start are there", self.written, tokens)

    @property
    def done(self) -> bool:
        """Whether enough was written."""
        return self.written >= self._tokens

    def on_submit(self, job: Job) -> None:
        """Give way to a request."""
        self._give_way()

    def on_event(self, job: Job, event: JobEvent) -> None:
        """Ignore an event."""

    def step(self) -> bool:
        """Run a pass; return whether there is more to do."""
        if self.done or not self._worker.idle:
            return False
        if self._steps is None:
            lm = self._worker.lm
            stops = frozenset(lm.model.defaults.stop_tokens)
            self._rounds += 1
            self._steps = answer_steps(lm.engine, self._prompts, stops, seed=self._rounds)
        try:
            ended = next(self._steps)
        except MemoryFullError:
            self._give_way()
            return False
        if ended is not None:
            self._worker.learn(ended)
            self._traces.append(ended)
            self.written += len(ended)
            if self.done or self.written - self._on_disk >= _KEPT_EVERY:
                self._keep()
        if self.done:
            self._give_way()
            _log.info("the warm start is complete")
        return not self.done

    def _give_way(self) -> None:
        """Release the answers that are not finished."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _keep(self) -> None:
        """Write all answers to disk; a full disk does not end the server."""
        self._traces = [join_traces(self._traces)]
        self._on_disk = self.written
        with suppress(PacelineError):
            write_trace(trace_path(self._worker.lm.model), self._traces[0])

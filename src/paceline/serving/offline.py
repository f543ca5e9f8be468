"""Runs several requests in one batch, without a server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from paceline.core import Output, Request
from paceline.errors import RequestError
from paceline.serving.messages import Job, JobEvent
from paceline.serving.worker import Worker

if TYPE_CHECKING:
    from paceline.lm import LM

_MAX_RUNNING = 32  # requests in a pass; the others wait for a place


def run_batch(lm: LM, requests: Sequence[Request]) -> list[Output]:
    """Run requests side by side and return their outputs, in their order.

    Every output is that of the request alone, token for token. A `KeyboardInterrupt` ends all that
    are not done with `finish == "interrupted"` and what there is.

    Args:
        lm: its engine must count its memory.
        requests: at least one.

    Raises:
        PacelineError: a request cannot be run; then none is.
        RequestError: one failed while it ran, in one sentence.
    """
    engine, outputs = lm.engine, dict[str, Output]()
    limit = engine.kv_limit
    worker = Worker(lm, min(len(requests), _MAX_RUNNING), queue=len(requests))
    try:
        for place, request in enumerate(requests):
            worker.submit(Job(str(place), request))
        while not worker.idle:
            _collect(worker.step(), outputs)
    except KeyboardInterrupt:
        _collect(worker.close("interrupted"), outputs)
    finally:
        worker.close()
        engine.shared = None
        engine.kv_limit = limit
    return [outputs[str(place)] for place in range(len(requests))]


def _collect(events: Iterable[JobEvent], outputs: dict[str, Output]) -> None:
    """Take the outputs of the requests that have ended."""
    for event in events:
        if event.error:
            raise RequestError(event.error)
        if event.output is not None:
            outputs[event.id] = event.output

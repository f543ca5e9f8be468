"""Measures what each text of a batch adds to a pass, beside the pass itself."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

from paceline.core import Cost, Request
from paceline.lm import LM
from paceline.serving.messages import Job
from paceline.serving.worker import Worker

_TEXTS, _TOKENS = 4, 12  # texts of the batch, and tokens of each answer
_PROMPT_TOKENS = 8  # few, so that the first pass reads all prompts


def batch_overhead(lm: LM, requests: Sequence[Request], cost: Cost) -> float:
    """Return the seconds that each text adds to a plain pass of a small batch.

    Sampling, stop rules and what the scheduler does for a text are in it.

    Args:
        lm: decodes without drafts.
        requests: give the prompts; at least one.
        cost: T(n) of its passes.
    """
    worker, times = Worker(lm, _TEXTS, queue=_TEXTS), []
    try:
        for place in range(_TEXTS):
            prompt = requests[place % len(requests)].prompt[-_PROMPT_TOKENS:]
            request = lm.request(prompt, max_new_tokens=_TOKENS, ignore_eos=True)
            worker.submit(Job(str(place), request))
        while not worker.idle:
            start = perf_counter()
            events = worker.step()
            if sum(len(event.tokens) for event in events) == _TEXTS:
                times.append(perf_counter() - start)
    finally:
        worker.close()
        lm.engine.shared = None
    return max(median(times) - cost.at(_TEXTS), 0.0) / _TEXTS if times else 0.0

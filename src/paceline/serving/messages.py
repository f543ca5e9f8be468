"""What goes into a worker and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from paceline.core import Floats, Output, Request, TokenTree
from paceline.decoding.strategies.base import Strategy

FAILED = "the server failed; its log says more"
FAILED_ALONE = "the server failed at this request; its log says more"


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it is handed in.

    Attributes:
        id: names it; unique.
        request: what is asked for.
        client: whose it is.
        priority: larger is more urgent.
        deadline: on the clock of `time.monotonic`; None has all the time.
        drafter: its method; None is the model's own.
        budget: nodes beyond the root; `auto` is the governor's; None takes the model's own.
        logprobs: how many of the likeliest tokens to tell at each; None tells nothing.
        after: a request with the same prompt, whose prompt is to be run first.
        strategy: a search that draws nothing; then no drafter, no budget and no logprobs.
    """

    id: str
    request: Request
    client: str = ""
    priority: int = 0
    deadline: float | None = None
    drafter: str | None = None
    budget: int | Literal["auto"] | None = None
    logprobs: int | None = None
    after: str | None = None
    strategy: Strategy | None = None


class Logprob(NamedTuple):
    """A drawn token's log probability at temperature 1 before any control, and the likeliest."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that a request's owner is told.

    Attributes:
        id: of the request.
        text: that became certain.
        tokens: that were drawn; their number is that of `origins`.
        origins: who guessed each token; None where nobody did.
        logprobs: of each token, where asked for.
        tree: of the pass, for those who look closely.
        path: the accepted nodes of it.
        texts: that each token made certain; joined, `text`.
        sources: names that the origins of the tree index.
        at: when the pass was over, in seconds of `time.monotonic`.
        passes: how many it tells of.
        finish: why it is over: as `Output.finish`, `deadline`, `cancelled` or `error`; else None.
        output: complete when it is over.
        cached: tokens of the prompt that were known from before, when it is over.
        error: what went wrong, in one sentence.
        found: all outputs of a search, best first, when it is over.
    """

    id: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    origins: list[str | None] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    tree: TokenTree | None = None
    path: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sources: Sequence[str] = ()
    at: float = 0.0
    passes: int = 0
    finish: str | None = None
    output: Output | None = None
    cached: int = 0
    error: str = ""
    found: Sequence[Output] = ()


@dataclass
class WorkerStats:
    """What was done since the start.

    Seconds are of the worker's thread; those of `draft` have what guides read in parts, too.
    """

    passes: int = 0
    nodes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    guessed: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    draft: float = 0.0
    forward: float = 0.0
    walk: float = 0.0
    guide: float = 0.0

    def count(self, event: JobEvent) -> None:
        """A tree was walked."""
        for origin in event.tree.origin[1:] if event.tree else ():
            name = event.sources[origin]
            self.guessed[name] = self.guessed.get(name, 0) + 1
        for name in filter(None, event.origins):
            self.accepted[name] = self.accepted.get(name, 0) + 1
        self.tokens += len(event.tokens)


def logprobs(logits: Floats, tokens: Sequence[int], count: int) -> list[Logprob]:
    """What was thought of the drawn `tokens` [A] and the `count` likeliest, given logits [A, V]."""
    found = []
    for row, token in zip(logits.astype(np.float64), tokens, strict=True):
        logs = row - row.max()
        logs -= np.log(np.exp(logs).sum())
        best = np.argsort(-logs, kind="stable")[:count]
        top = [(int(each), float(logs[each])) for each in best]
        found.append(Logprob(token, float(logs[token]), top))
    return found

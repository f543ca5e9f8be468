"""What is submitted to a worker, and the events that come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats, Output, Request, TokenTree
from paceline.decoding.strategies.base import Strategy

FAILED = "the server failed; its log says more"
FAILED_ALONE = "the server failed at this request; its log says more"


@dataclass(frozen=True, slots=True)
class Job:
    """A request as it is submitted.

    Attributes:
        id: unique name.
        request: what to generate.
        client: whose request it is; the scheduler is fair among clients.
        priority: a larger number is more urgent.
        deadline: in seconds of `time.monotonic`; None sets no deadline.
        drafter: drafting method; None is the model's own.
        budget: nodes beyond the root; `auto` leaves them to the governor; None is the model's own
            budget.
        logprobs: number of most likely tokens to report at each position; None reports no
            log-probabilities.
        after: id of a request with the same prompt that should prefill it first.
        strategy: a search without sampling; then drafter, budget and logprobs must be None.
        reasoning: separated from the answer: where `tags` begin it, or the prompt has opened them;
            None: it is part of the text.
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
    reasoning: Literal["tags", "open"] | None = None


class Logprob(NamedTuple):
    """The log-probability of a token, at temperature 1 and before any control.

    `top` has the most likely tokens and their log-probabilities. `rank` is 1 for the most likely
    token. The first token of a prompt has no log-probability.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a request.

    Attributes:
        id: of the request.
        text: new text that is certain.
        tokens: new tokens; as many as `origins`.
        origins: name of the drafter that proposed each token; None where none did.
        logprobs: of each token, if requested.
        tree: of the pass, for traces.
        path: its accepted nodes.
        texts: text that each token made certain; joined they are `text`.
        sources: names that `tree.origin` indexes.
        at: end of the pass, in seconds of `time.monotonic`.
        passes: number of passes that the event covers.
        finish: why the request ended: as `Output.finish`, or `deadline`, `cancelled` or `error`;
            None while it runs.
        output: complete at the end.
        cached: prompt tokens taken from the prefix cache, at the end.
        error: what went wrong, in one sentence.
        outputs: all outputs of a search, best first, at the end.
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
    outputs: Sequence[Output] = ()


@dataclass
class WorkerStats:
    """Counters since the start.

    Times are in seconds of the worker's thread; `draft` includes the time in which guides read
    texts. `freed_pages` are those that KV policies gave back while requests ran.
    """

    passes: int = 0
    nodes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    guessed: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    preempted: int = 0
    freed_pages: int = 0
    draft: float = 0.0
    forward: float = 0.0
    walk: float = 0.0
    guide: float = 0.0

    def count(self, event: JobEvent) -> None:
        """Count the tree and the tokens of an event."""
        for origin in event.tree.origin[1:] if event.tree else ():
            name = event.sources[origin]
            self.guessed[name] = self.guessed.get(name, 0) + 1
        for name in filter(None, event.origins):
            self.accepted[name] = self.accepted.get(name, 0) + 1
        self.tokens += len(event.tokens)


def _best(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Return the indices of the largest values, of equal ones the first."""
    if not count:
        return np.zeros(0, np.intp)
    least = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    among = np.flatnonzero(values >= least)
    return among[np.argsort(-values[among], kind="stable")[:count]]


def logprobs(logits: Floats, tokens: Sequence[int], count: int) -> list[Logprob]:
    """Return the log-probabilities of drawn tokens and of the most likely alternatives.

    Args:
        logits: [A, V].
        tokens: the drawn tokens, [A].
        count: number of alternatives at each position.
    """
    rows = []
    for row, token in zip(logits.astype(np.float64), tokens, strict=True):
        logs = row - row.max()
        logs -= np.log(np.exp(logs).sum())
        top = [(int(each), float(logs[each])) for each in _best(logs, count)]
        rank = 1 + int((logs > logs[token]).sum())
        rows.append(Logprob(token, float(logs[token]), top, rank))
    return rows

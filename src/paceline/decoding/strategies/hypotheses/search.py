"""A running search: its hypotheses, their logits, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import shared
from paceline.control.capabilities import Forkable, RunsModel
from paceline.control.guides.base import Guide, run_trees_together
from paceline.core import Floats, Output, Request, Tokens, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import SearchOutput, Task
from paceline.decoding.strategies.hypotheses.scores import log_probs
from paceline.drafters.base import Target
from paceline.engines.base import Cached
from paceline.registry import drafters

Guides = tuple[Forkable, ...]


@dataclass(slots=True, eq=False)
class Hypothesis:
    """A running text; `sequence` holds all of `history` but its last token.

    Attributes:
        history: the prompt and the new tokens.
        score: total log-probability of the new tokens, in nats.
        guides: forks of the request's guides, which follow this text.
    """

    history: list[int]
    score: float
    sequence: Cached
    guides: Guides = ()

    @property
    def text(self) -> Tokens:
        """The history as an array [S]."""
        return np.array(self.history, np.int32)


class Search:
    """Sequences of a search, all released at the end, and its cost.

    As a context manager it suppresses a `KeyboardInterrupt` and sets `interrupted`.

    Attributes:
        request: the task's request without guides, which act on logits before a search sees them.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.engine = task, task.engine
        self.request = without_guides(task.request)
        self.cost = Output()
        self.interrupted = False
        self._live: list[Cached] = []
        self._guides: list[RunsModel] = []
        self._decoded = False
        self._begun = perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> bool:
        for sequence in self._live:
            self.engine.release(sequence)
        for guide in self._guides:
            guide.release()
        self._live, self._guides = [], []
        seconds = self.cost.seconds
        seconds.decode = perf_counter() - self._begun - seconds.prefill
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.interrupted |= stopped
        return stopped

    # ------------------------------------------------------------------ hypotheses

    def start(self, observe: Callable[[int, TokenTree, Floats], None] | None = None) -> Hypothesis:
        """Run the prompt but its last token; return it as a hypothesis."""
        begun = perf_counter()
        request = self.task.request
        sequence = self.engine.start(np.array(request.prompt[:-1], np.int32), observe, prompt=True)
        self._live.append(sequence)
        guides = branching(request.controls)
        self._guides += guides
        for guide in guides:
            guide.begin(sequence)
            guide.follow(np.array(request.prompt, np.int32))
        self.cost.seconds.prefill += perf_counter() - begun
        return Hypothesis(list(request.prompt), 0.0, sequence, guides)

    def fork(self, parent: Hypothesis, history: list[int]) -> Hypothesis:
        """Return a fork of a hypothesis with the same committed positions and another `history`."""
        sequence = self.engine.fork(parent.sequence)
        self._live.append(sequence)
        guides = self._fork_guides(parent, history, sequence)
        return Hypothesis(list(history), parent.score, sequence, guides)

    def _fork_guides(
        self, parent: Hypothesis, history: list[int], target: Cached | None = None
    ) -> Guides:
        context, forks = np.array(history, np.int32), list[Forkable]()
        for guide in parent.guides:
            forks.append(guide.fork(context, target))
            self._guides.append(forks[-1])
        return tuple(forks)

    def release(self, hypothesis: Hypothesis) -> None:
        """Release one hypothesis before the end."""
        self._live = [other for other in self._live if other is not hypothesis.sequence]
        self.engine.release(hypothesis.sequence)
        for guide in hypothesis.guides:
            self._guides = [other for other in self._guides if other is not guide]
            guide.release()

    def move(self, hypothesis: Hypothesis, history: Sequence[int]) -> None:
        """Move a hypothesis to another text; the common prefix stays in its cache."""
        sequence = hypothesis.sequence
        target = list(history[:-1])
        same = shared(hypothesis.history[: sequence.length], target)
        if same < sequence.length:
            same = self.engine.cut_point(sequence, same)
            self.engine.truncate(sequence, same)
        if same < len(target):
            self.engine.extend(sequence, np.array(target[same:], np.int32))
            self.cost.passes += 1
            self.cost.nodes += len(target) - same
        hypothesis.history = list(history)

    def grow(
        self, live: Sequence[Hypothesis], chosen: Sequence[tuple[Hypothesis, int, float]]
    ) -> list[Hypothesis]:
        """Return the successors of `live` after `next_logits`: one for each (parent, token, score).

        A parent's sequence goes to its first child, and other children get forks; a parent without
        children is released. So there are never more sequences than hypotheses.
        """
        parents = {id(parent) for parent, _, _ in chosen}
        for hypothesis in live:
            if id(hypothesis) not in parents:
                self.release(hypothesis)
        children, taken = [], set()
        for parent, token, score in chosen:
            history = [*parent.history, token]
            if id(parent) in taken:
                child = self.fork(parent, history)
            else:
                self.engine.commit(parent.sequence, [0])
                taken.add(id(parent))
                child = Hypothesis(history, score, parent.sequence, parent.guides)
            child.score = score
            children.append(child)
        return children

    # ------------------------------------------------------------------------ rows

    def forward(self, batch: Sequence[tuple[Hypothesis, TokenTree]]) -> Floats:
        """Run one pass over all trees, whose roots end the texts; see `Engine.forward`.

        Guides run before it, so that `guided` finds their rows.
        """
        begun = perf_counter()
        _run_guides(batch)
        guided = perf_counter() if batch[0][0].guides else begun
        logits = self.engine.forward([(each.sequence, tree) for each, tree in batch])
        self.cost.passes += 1
        self.cost.nodes += sum(len(tree) for _, tree in batch)
        self.cost.seconds.guide += guided - begun
        self.cost.seconds.forward += perf_counter() - guided
        return logits

    def forward_mixed(self, hypothesis: Hypothesis, tokens: Tokens, weights: Floats) -> Floats:
        """Run one node that is a weighted sum of token embeddings; see `Engine.forward_mixed`.

        Args:
            hypothesis: whose sequence the node follows.
            tokens: int32 [1, K].
            weights: float32 [1, K], which sum to 1.

        Returns:
            logits [1, V].
        """
        begun = perf_counter()
        logits = self.engine.forward_mixed(hypothesis.sequence, tokens, weights)
        self.cost.passes += 1
        self.cost.nodes += 1
        self.cost.seconds.forward += perf_counter() - begun
        return logits

    def guided(self, hypothesis: Hypothesis, logits: Floats) -> Floats:
        """Return the logits [V] at the end of a hypothesis after its guides."""
        for guide in hypothesis.guides:
            logits = guide.ranking_logits(logits, hypothesis.history)
        return logits

    def next_logits(self, live: Sequence[Hypothesis]) -> list[Floats]:
        """Return the guided logits [V] after each hypothesis, in one pass."""
        rows = self.forward([(each, TokenTree.root(each.history[-1])) for each in live])
        return [self.guided(each, row) for each, row in zip(live, rows, strict=True)]

    def log_probs(self, live: Sequence[Hypothesis]) -> list[NDArray[np.float64]]:
        """Return the log-probabilities [V] after each hypothesis, in one pass; see `scores`."""
        rows = zip(live, self.next_logits(live), strict=True)
        return [log_probs(row, each.history, self.request) for each, row in rows]

    # --------------------------------------------------------------------- outputs

    def decode(self, request: Request, held: Hypothesis) -> Output:
        """Decode a request in the loop, with the task's drafter if there is one.

        A fork of `held`, whose text is the request's prompt, continues. The first request runs its
        prompt from the beginning instead, so that a drafter can learn from it.
        """
        task = self.task
        drafter, budget = task.drafter, task.budget
        if drafter is None:
            drafter = drafters.parse("plain").build(Target(self.engine.config.vocab_size))
            budget = Fixed(0)
        anew = drafter.learns_from_prompt and not self._decoded
        self._decoded = True
        request = self.branch(request, held)
        sequence = None if anew else self.engine.fork(held.sequence)
        stream = task.stream() if task.stream else None
        generation = Generation(self.engine, drafter, request, budget, stream, sequence=sequence)
        output = generation.run()
        self._charge(output)
        return output

    def branch(self, request: Request, held: Hypothesis) -> Request:
        """Return `request` with forks of a hypothesis' guides; its text extends the hypothesis."""
        own = without_guides(request)
        return replace(own, controls=(*self._fork_guides(held, held.history), *own.controls))

    def _charge(self, output: Output) -> None:
        cost, more = self.cost, output.seconds
        cost.passes += output.passes
        cost.nodes += output.nodes
        for part in ("prefill", "draft", "forward", "walk", "guide"):
            setattr(cost.seconds, part, getattr(cost.seconds, part) + getattr(more, part))
        for name, count in output.accepted.items():
            cost.accepted[name] = cost.accepted.get(name, 0) + count

    def output(self, tokens: Sequence[int], score: float, ended: bool) -> SearchOutput:
        """Return an output of this search."""
        task = self.task
        finish = "length" if task.limit == task.request.max_new_tokens else "context"
        if self.interrupted and not ended and len(tokens) < task.limit:
            finish = "interrupted"
        return SearchOutput(
            tokens=list(tokens),
            text=task.read(tokens)[0],
            finish="stop" if ended else finish,
            passes=self.cost.passes,
            nodes=self.cost.nodes,
            seconds=replace(self.cost.seconds),
            parser=task.request.parser,
            score=score,
        )


def branching(controls: Iterable[object]) -> Guides:
    """Return the guides among some controls."""
    return tuple(control for control in controls if isinstance(control, Forkable))


def without_guides(request: Request) -> Request:
    """Return `request` without its guides."""
    others = tuple(c for c in request.controls if not isinstance(c, RunsModel))
    return replace(request, controls=others)


def _run_guides(batch: Sequence[tuple[Hypothesis, TokenTree]]) -> None:
    """Run the guides of every text over its tree, each guide with its forks in one pass."""
    for forks in zip(*(each.guides for each, _ in batch), strict=True):
        asked = [(fork, each.text, tree) for fork, (each, tree) in zip(forks, batch, strict=True)]
        ours = [(fork, text, tree) for fork, text, tree in asked if isinstance(fork, Guide)]
        if len(ours) == len(asked):
            run_trees_together(ours)
            continue
        for fork, text, tree in asked:
            fork.run_tree(text, tree)

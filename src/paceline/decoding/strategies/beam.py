"""Beam search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Exactness
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.scores import best, dead_end
from paceline.decoding.strategies.hypotheses.search import Hypothesis, Search
from paceline.errors import MethodError
from paceline.registry import Source, check_range, strategies

_STOPPING = ("true", "false", "never")
_WIDEST = 1024  # hypotheses; each has a cache


@strategies.register("beam", Exactness.LOSSY)
@dataclass(frozen=True)
class Beam(Strategy):
    """Keep the `width` most likely texts; one pass extends all of them by a token.

    Every step extends each hypothesis by every token and keeps the best by total log-probability.
    Ended hypotheses are ranked by that total over length ** `length_penalty`, which is their score.
    Controls apply at each hypothesis' own node: they forbid tokens or add to log-probabilities,
    which are not normalised again. Nothing is drawn and nothing drafted; the outputs are those of
    transformers.

    Cost: one pass over `width` nodes a token, and a copy of a cache where a hypothesis splits.
    Memory: `width` caches.
    Good for: translation and other short answers with one right text. Open-ended text gets dull.

    Attributes:
        width: running hypotheses, 1 to 1024. Default 4; more is rarely better.
        returned: outputs given, 1 to `width`. Default 1.
        length_penalty: exponent of the length in the score; above 0 favours long outputs.
            Default 1: the mean log-probability.
        early_stopping: `true` stops when `width` texts have ended; `false` when the best running
            text ranks below all of them at its present length; `never` when it cannot rank above
            one at any length. Default `false`, as in transformers.
    """

    width: int = 4
    returned: int = 1
    length_penalty: float = 1.0
    early_stopping: str = "false"

    examples = ("beam", "beam:width=3,returned=2")
    source = Source(
        authors="Lowerre",
        title="The Harpy Speech Recognition System, 1976",
        note="ranked as transformers does",
    )

    def __post_init__(self) -> None:
        check_range(1, _WIDEST, self.name, width=self.width)
        check_range(1, self.width, self.name, returned=self.returned)
        check_range(-100, 100, self.name, length_penalty=self.length_penalty)
        if self.early_stopping not in _STOPPING:
            raise MethodError(
                f"{self.name}:early_stopping is {self.early_stopping!r}, "
                f"expected {', '.join(_STOPPING)}"
            )

    def run(self, task: Task) -> list[SearchOutput]:
        """Return the best `returned` texts."""
        self.check(task)
        return beam_search(task, self, 1, 0.0)


class FinishedHypothesis(NamedTuple):
    """A text that has ended."""

    tokens: list[int]
    score: float
    stopped: bool  # by a stop token or string, not by the limit


class BeamGroup:
    """Hypotheses that compete with each other: the running ones, and the best ended ones."""

    def __init__(self, task: Task, settings: Beam, width: int) -> None:
        self._task, self._settings, self.width = task, settings, width
        self._start = len(task.request.prompt)
        self.running: list[Hypothesis] = []
        self.ended: list[FinishedHypothesis] = []
        self.done = False

    def choose(
        self, log_probs: NDArray[np.float64], penalties: NDArray[np.float64] | float
    ) -> list[tuple[Hypothesis, int, float]]:
        """Return the continuations of `running` that go on; those that end join `ended`.

        Args:
            log_probs: float64 [B, V], of the next tokens.
            penalties: [V], subtracted for this choice only, not from scores.

        Returns:
            (parent, token, score) of each; empty when the group is done.
        """
        scores = log_probs + np.array([h.score for h in self.running])[:, None]
        # Enough to leave `width` that go on, even if every way to end a text is among them.
        spare = max(2, 1 + len(self._task.request.stop_tokens))
        going: list[tuple[Hypothesis, int, float]] = []
        ended: list[FinishedHypothesis] = []
        size = len(self.running[0].history) - self._start + 1
        for rank, place in enumerate(best(scores - penalties, spare * self.width)):
            row, token = divmod(int(place), scores.shape[1])
            parent, score = self.running[row], float(scores[row, token])
            tokens = [*parent.history[self._start :], token]
            stopped = self._task.ends(tokens)
            if not stopped and size < self._task.limit:
                going.append((parent, token, score))
            elif rank < self.width:
                ended.append(FinishedHypothesis(tokens, self._ranked(score, size), stopped))
        going = going[: self.width]
        self.ended = sorted([*self.ended, *ended], key=lambda end: -end.score)[: self.width]
        self.done = not going or self._hopeless(going[0][2], size)
        return [] if self.done else going

    def rest(self) -> list[FinishedHypothesis]:
        """Return the running hypotheses as they are, after an interruption."""
        tokens = [h.history[self._start :] for h in self.running]
        scores = [h.score for h in self.running]
        pairs = zip(tokens, scores, strict=True)
        return [FinishedHypothesis(t, self._ranked(s, len(t)), False) for t, s in pairs if t]

    def _hopeless(self, score: float, size: int) -> bool:
        """Return whether no running hypothesis, the best having `score`, can still matter."""
        settings = self._settings
        if len(self.ended) < self.width:
            return False
        if settings.early_stopping == "true":
            return True
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            size = self._task.limit
        return self._ranked(score, size) <= self.ended[-1].score

    def _ranked(self, score: float, size: int) -> float:
        return float(score / size**self._settings.length_penalty)


def beam_search(task: Task, settings: Beam, groups: int, penalty: float) -> list[SearchOutput]:
    """Run beam search in `groups` of equal width; see `Beam` and `diverse.DiverseBeam`."""
    state = [BeamGroup(task, settings, settings.width // groups) for _ in range(groups)]
    with Search(task) as search:
        first = search.start()
        for group in state:
            group.running = [first if group is state[0] else search.fork(first, first.history)]
        while open_groups := [group for group in state if not group.done]:
            live = [hypothesis for group in open_groups for hypothesis in group.running]
            _choose(search, open_groups, live, search.log_probs(live), penalty)
    ended = [end for group in state for end in group.ended]
    if search.interrupted and len(ended) < settings.returned:
        ended += [end for group in state for end in group.rest()]
    ended.sort(key=lambda end: -end.score)
    return [search.output(*end) for end in ended[: settings.returned]]


def _choose(
    search: Search,
    groups: Sequence[BeamGroup],
    live: Sequence[Hypothesis],
    rows: Sequence[NDArray[np.float64]],
    penalty: float,
) -> None:
    """Run one step of every group; a token that earlier groups took costs later ones `penalty`."""
    taken = np.zeros(len(rows[0]))
    chosen, counts, start = [], [], 0
    for group in groups:
        count = len(group.running)
        going = group.choose(np.stack(rows[start : start + count]), penalty * taken)
        if group.done and not group.ended:
            raise dead_end(len(group.running[0].history))
        np.add.at(taken, [token for _, token, _ in going], 1)
        chosen += going
        counts.append(len(going))
        start += count
    children = iter(search.grow(live, chosen))
    for group, count in zip(groups, counts, strict=True):
        group.running = [next(children) for _ in range(count)]

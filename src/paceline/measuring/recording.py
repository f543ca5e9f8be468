"""Records the passes of an answer for reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from paceline.core import TokenTree
from paceline.decoding.governor import Budget, Fixed, Paths, Trees
from paceline.measuring.calibration import Pass
from paceline.models.detokenize import Detokenizer


@dataclass
class RecordingBudget:
    """A budget that keeps the passes recorded with it; decisions are left to `budget`."""

    budget: Budget
    passes: list[Pass] = field(default_factory=list)

    def nodes_wanted(self, requests: int = 1) -> int:
        """See `Budget`."""
        return self.budget.nodes_wanted(requests)

    def nodes_for_forced(self) -> int:
        """See `Budget`."""
        return self.budget.nodes_for_forced()

    def min_path_prob(self) -> float:
        """See `Budget`."""
        return self.budget.min_path_prob()

    def prune(self, trees: Trees, seconds: float, other_tokens: int = 0) -> list[TokenTree]:
        """See `Budget`."""
        return self.budget.prune(trees, seconds, other_tokens)

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, other_tokens: int = 0
    ) -> None:
        """See `Budget`."""
        self.passes += zip(trees, paths, strict=True)
        self.budget.record(trees, paths, draft, forward, other_tokens)

    def charge(self, seconds: float) -> None:
        """See `Budget`."""
        self.budget.charge(seconds)


@dataclass(frozen=True)
class RecordingFixedBudget(Fixed):
    """A fixed budget that keeps its passes; the rejection walk takes no other kind."""

    passes: list[Pass] = field(default_factory=list)

    def record(
        self, trees: Trees, paths: Paths, draft: float, forward: float, other_tokens: int = 0
    ) -> None:
        """See `Budget`."""
        self.passes.extend(zip(trees, paths, strict=True))


def recording_budget(budget: Budget) -> RecordingBudget | RecordingFixedBudget:
    """Return a budget that decides as `budget` does and keeps the passes."""
    return (
        RecordingFixedBudget(budget.nodes) if isinstance(budget, Fixed) else RecordingBudget(budget)
    )


@dataclass(frozen=True, slots=True)
class TracedToken:
    """A token of an answer, and where it came from.

    Attributes:
        text: that the token completed; empty where later tokens complete a character.
        origin: which origin drafted it; None for the model's own token, which ends a pass.
        score: probability that the draft claimed; None without one.
        depth: in the tree; 0 for the model's own token.
        number: of the pass, from 1.
        nodes: of the pass, root included.
    """

    text: str
    origin: str | None
    score: float | None
    depth: int
    number: int
    nodes: int


def trace(
    passes: Sequence[Pass], tokens: Sequence[int], origins: Sequence[str], pieces: Detokenizer
) -> list[TracedToken]:
    """Return one entry for each of an answer's `tokens`."""
    texts = [pieces.push(token) for token in tokens]
    if texts:
        texts[-1] += pieces.flush()
    return [
        TracedToken(text, *who) for text, who in zip(texts, _who(passes, origins), strict=False)
    ]


def _who(
    passes: Sequence[Pass], origins: Sequence[str]
) -> Iterator[tuple[str | None, float | None, int, int, int]]:
    for number, (tree, path) in enumerate(passes, 1):
        for depth, node in enumerate(path[1:], 1):
            yield origins[tree.origin[node]], float(tree.scores[node]), depth, number, len(tree)
        yield None, None, 0, number, len(tree)

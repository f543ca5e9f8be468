"""What the planner asks to be measured."""

from __future__ import annotations

from typing import Any, Protocol

from paceline.planning.measured_facts import MAX_NODES, PromptFacts
from paceline.planning.setups import CacheForm


class Measuring(Protocol):
    """Makes the measurements of a plan; tests have one that measures nothing."""

    prompts: PromptFacts

    def fingerprint(self, path: str) -> str:
        """Return what identifies a checkpoint."""
        ...

    def check_tokens(self, path: str) -> None:
        """Refuse a checkpoint with other tokens than the model's."""
        ...

    def warm_start(self) -> str:
        """Return what identifies the recorded texts from which drafters start; empty: none."""
        ...

    def bandwidth(self) -> float:
        """Return the memory bandwidth in bytes a second."""
        ...

    def reference(self) -> float:
        """Return the seconds of a plain pass of the planned model, now."""
        ...

    def engine(
        self,
        path: str,
        weight_format: str,
        threads: int | None,
        weights_memory: int | None = None,
    ) -> dict[str, Any]:
        """Return `EngineFacts` as a document."""
        ...

    def streamed_pass(self, weights_memory: int) -> float:
        """Return the seconds of a plain pass now whose weights stream from disk."""
        ...

    def reads(self, attention: str, cached: int) -> dict[str, Any]:
        """Return `ReadFacts` of an attention pattern as a document."""
        ...

    def nats(self, path: str, weight_format: str, cache: CacheForm, window: int) -> list[float]:
        """Return the nats a token of each window of the text."""
        ...

    def drafts(self, drafter: str, nodes: int = MAX_NODES) -> dict[str, Any]:
        """Return `DraftFacts` with budgets of up to so many nodes as a document."""
        ...

    def scores(self, path: str, weight_format: str, cache: CacheForm) -> list[float]:
        """Return the judge's score of the answer to each prompt."""
        ...

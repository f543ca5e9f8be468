"""What an engine must do: run a model over token trees, and keep the rows of the accepted nodes.

An engine never sees a drafter, and a drafter never sees an engine; `decoding/loop.py` knows both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from paceline.core import Floats, Tokens, TokenTree
from paceline.errors import RequestError
from paceline.models.config import ModelConfig

Rows = Literal["all", "none"]


class Cached(Protocol):
    """One sequence's keys and values inside an engine. Opaque but for its length."""

    @property
    def length(self) -> int:
        """Positions that are committed."""
        ...


class Engine(ABC):
    """Runs one model.

    Attributes:
        name: `native` or `reference`.
        config: the model's shape.
        format: how the weights are stored, e.g. `fp32`.
        invariant: every logit is bit-identical for any tree, batch, chunking and thread count.
            Where it is not, outputs may part at near-equal logits, within `tolerance`.
        tolerance: largest difference that rounding may make between two logits' distances.
    """

    name: str
    config: ModelConfig
    format: str
    invariant: bool
    tolerance: float

    @abstractmethod
    def open(self) -> Cached:
        """A new, empty sequence."""

    @abstractmethod
    def forward(self, batch: Sequence[tuple[Cached, TokenTree]], rows: Rows = "all") -> Floats:
        """Run the model once over every node of every tree.

        Node i of a tree sits at position `sequence.length + depth(i)` and sees the committed
        positions and its own ancestors. A sequence may appear once in a batch. Nothing is
        committed: a second `forward` on a sequence forgets the first.

        Returns:
            logits, float32 [sum of N, V] in the order of the batch; [0, V] when `rows` is `none`.
            Valid until the next `forward`.

        Raises:
            RequestError: a token is outside the vocabulary, or the context is full.
        """

    @abstractmethod
    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of `path`, node indices [A] of the last `forward`, root first.

        Each is the parent of the next. The sequence grows by A. Once for each `forward`.
        """

    @abstractmethod
    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on."""

    @abstractmethod
    def fork(self, sequence: Cached) -> Cached:
        """An independent copy of the committed positions."""

    @abstractmethod
    def release(self, sequence: Cached) -> None:
        """Give the memory back; the sequence must not be used again. Twice is harmless."""

    def start(
        self,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
    ) -> Cached:
        """A new sequence holding `tokens` [S], run in chunks of `chunk` positions.

        Logits are computed only for `observe(offset, tree, logits)`, called once for each chunk.
        """
        sequence = self.open()
        try:
            self.extend(sequence, tokens, observe, chunk)
        except BaseException:
            self.release(sequence)
            raise
        return sequence

    def extend(
        self,
        sequence: Cached,
        tokens: Tokens,
        observe: Callable[[int, TokenTree, Floats], None] | None = None,
        chunk: int = 256,
    ) -> None:
        """Commit `tokens` [S] to a sequence, as `start` does."""
        for offset in range(0, len(tokens), chunk):
            tree = TokenTree.chain(tokens[offset : offset + chunk])
            logits = self.forward([(sequence, tree)], "all" if observe else "none")
            if observe:
                observe(offset, tree, logits)
            self.commit(sequence, np.arange(len(tree), dtype=np.int32))

    def check(self, sequence: Cached, tree: TokenTree) -> None:
        """Refuse tokens outside the vocabulary and trees that do not fit the context.

        Raises:
            RequestError: as said.
        """
        low, high = int(tree.tokens.min()), int(tree.tokens.max())
        if low < 0 or high >= self.config.vocab_size:
            found = low if low < 0 else high
            raise RequestError(
                f"token {found} is outside the vocabulary of {self.config.vocab_size}"
            )
        deepest = sequence.length + int(tree.depths().max()) + 1
        if deepest > self.config.context:
            raise RequestError(
                f"position {deepest} is beyond the model's context of {self.config.context} tokens"
            )

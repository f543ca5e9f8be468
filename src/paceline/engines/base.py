"""What an engine must do: run a model over token trees, and keep the rows of the accepted nodes.

An engine never sees a drafter, and a drafter never sees an engine; `decoding/loop.py` knows both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from paceline.core import Floats, Tokens, TokenTree
from paceline.errors import MethodError, RequestError
from paceline.models.config import ModelConfig

PAGE = 64  # positions of a page of keys and values
# Whose logits a pass gives: of every tree, of none, or of those that a list says.
Rows = Literal["all", "none"] | Sequence[bool]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The part of a model that a pass uses which only drafts.

    Attributes:
        layers: int32, increasing indices of the layers that are run; the others pass on what they
            get. None runs all.
        positions: int32, increasing committed positions that the nodes see besides their own
            ancestors; every position stays where it is. A window hides those outside it as ever.
            None shows all. They are gathered in every pass: runs of sixteen aligned ones are
            cheap, scattered ones can cost as much as to see everything.
    """

    layers: Tokens | None = None
    positions: Tokens | None = None

    def check(self, layers: int, length: int) -> None:
        """Refuse what does not fit a model of `layers` layers or `length` committed positions.

        Raises:
            RequestError: as said.
        """
        ends = {"layers": (self.layers, layers), "positions": (self.positions, length)}
        for name, (part, end) in ends.items():
            if part is None:
                continue
            if not isinstance(part, np.ndarray) or part.ndim != 1 or part.dtype != np.int32:
                raise RequestError(f"the {name} of a view are {part!r:.80}, expected an int32 list")
            if len(part) and (part[0] < 0 or part[-1] >= end or (np.diff(part) <= 0).any()):
                raise RequestError(
                    f"the {name} of a view are {part}, expected increasing ones below {end}"
                )


@dataclass(frozen=True, slots=True)
class Memory:
    """Pages that hold keys and values of all sequences of an engine, `PAGE` positions each.

    Attributes:
        page_bytes: size of a page.
        used: pages that sequences hold; one that many hold counts once.
        shared: those that more than one sequence holds.
        reserved: pages that are in memory, the empty ones too; never above the limit.
        limit: how many there may be; None: no limit.
    """

    page_bytes: int
    used: int
    shared: int
    reserved: int
    limit: int | None

    @property
    def free(self) -> int | None:
        """Pages that can still be taken; None: any number."""
        return None if self.limit is None else self.limit - self.used

    @staticmethod
    def pages(positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // PAGE)


def wanted(rows: Rows, batch: Sized) -> list[bool]:
    """Of each tree of a batch, whether its logits are wanted.

    Raises:
        RequestError: `rows` is of another length.
    """
    if isinstance(rows, str):
        return [rows == "all"] * len(batch)
    if len(rows) != len(batch):
        raise RequestError(f"rows says what is wanted of {len(rows)} trees, not {len(batch)}")
    return list(rows)


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
        kv_format: how keys and values are cached.
        invariant: every logit is bit-identical for any tree, batch, chunking and thread count.
            Where it is not, outputs may part at near-equal logits, within `tolerance`.
        tolerance: largest difference that rounding may make between two logits' distances.
        abilities: the parts of a `View` that `forward` can leave out: `layers`, `positions`; and
            `hidden`, if `hidden()` can be asked.
    """

    name: str
    config: ModelConfig
    format: str
    kv_format: str
    invariant: bool
    tolerance: float
    abilities: frozenset[str] = frozenset()

    @property
    def memory(self) -> Memory:
        """The pages of keys and values now.

        Raises:
            MethodError: this engine does not count them.
        """
        raise MethodError(f"the {self.name} engine does not count its memory")

    @property
    def kv_limit(self) -> int | None:
        """Most bytes that the pages of all sequences may take; None: no limit. Can be set.

        Passes and forks that would need more raise `MemoryFullError`.

        Raises:
            MethodError: the engine knows no limit, the limit is below a page, or there are more.
        """
        memory = self.memory
        return None if memory.limit is None else memory.limit * memory.page_bytes

    @kv_limit.setter
    def kv_limit(self, limit: int | None) -> None:
        size = self.memory.page_bytes
        if limit is not None and limit < size:
            raise MethodError(
                f"a limit of {limit} bytes holds no page of keys and values; expected {size} bytes "
                f"({PAGE} positions) at least"
            )
        self._limit_pages(None if limit is None else limit // size)

    def _limit_pages(self, pages: int | None) -> None:
        raise MethodError(f"the {self.name} engine has no limit of memory")

    def pages(self, sequence: Cached) -> Sequence[int]:
        """What tells the pages of a sequence from all others that are held now, in their order.

        Two sequences that share a page name it alike.
        """
        raise MethodError(f"the {self.name} engine does not count its memory")

    @abstractmethod
    def open(self) -> Cached:
        """A new, empty sequence."""

    @abstractmethod
    def forward(
        self,
        batch: Sequence[tuple[Cached, TokenTree]],
        rows: Rows = "all",
        view: View | None = None,
    ) -> Floats:
        """Run the model once over every node of every tree.

        Node i of a tree sits at position `sequence.length + depth(i)` and sees the committed
        positions and its own ancestors. A sequence may appear once in a batch. Nothing is
        committed: a second `forward` on a sequence forgets the first.

        With a `view` the pass uses that part of the model, the same for every tree of the batch.
        Such a pass is for drafting: it cannot be committed, and leaves no trace in later ones.

        Returns:
            logits, float32 [sum of N, V] of the trees that `rows` wants, in the order of the batch.
            Valid until the next `forward`.

        Raises:
            RequestError: a token is outside the vocabulary, the context is full, or the view does
                not fit the model or the sequence.
            MemoryFullError: more pages are needed than `kv_limit` leaves. Nothing was changed:
                other sequences can be released, and the same pass run again.
        """

    def hidden(self) -> Floats:
        """What the head was given in the last `forward`: hidden states after the last norm.

        float32 [sum of N, hidden size], one row for each row of logits. As invariant as they are.

        Raises:
            RequestError: the last forward had no rows, or the engine lacks the ability.
        """
        raise RequestError(f"the engine {self.name} gives no hidden states")

    @abstractmethod
    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of `path`, node indices [A] of the last `forward`, root first.

        Each is the parent of the next. The sequence grows by A. Once for each `forward`, which
        must have had no view.
        """

    @abstractmethod
    def truncate(self, sequence: Cached, length: int) -> None:
        """Forget all positions from `length` on."""

    @abstractmethod
    def fork(self, sequence: Cached) -> Cached:
        """Another sequence of the same committed positions; from there on each goes its own way.

        Raises:
            MemoryFullError: the engine copies pages, and more are needed than `kv_limit` leaves.
        """

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

    def check(self, sequence: Cached, tree: TokenTree, view: View | None = None) -> None:
        """Refuse tokens outside the vocabulary, and trees and views that do not fit.

        Raises:
            RequestError: as said.
        """
        if view:
            view.check(len(self.config.layers), sequence.length)
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

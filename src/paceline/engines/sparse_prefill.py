"""How prompts choose, in blocks of 64 positions, what they read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from paceline.errors import ModelError, RequestError

if TYPE_CHECKING:
    from paceline.models.config import ModelConfig

BLOCK = 64  # positions of a block, of queries and of keys
LEAF = 16  # positions of a leaf of a tree search


class PrefillRule(IntEnum):
    """How a query head chooses; the native engine knows the same numbers.

    MASS: blocks by the attention of samples, up to a threshold.
    A_SHAPE: the last `first` positions before the local blocks.
    VERTICAL_SLASH: what the distances with most attention of the samples reach, until that is
        `second` positions; then the `first` positions with most attention besides.
    MEAN_BLOCKS: the `first` blocks whose mean key has the largest product with the mean query.
    TREE: `first` runs of 16, found by halving ranges whose middle run fits a sample best.
    """

    MASS = 0
    A_SHAPE = 1
    VERTICAL_SLASH = 2
    MEAN_BLOCKS = 3
    TREE = 4


@dataclass(frozen=True, slots=True)
class HeadRule:
    """How one query head chooses, and the numbers of its rule."""

    rule: PrefillRule = PrefillRule.MASS
    first: int = 0
    second: int = 0


@dataclass(frozen=True, slots=True)
class SparsePrefill:
    """How the blocks of a prompt are chosen, for each query head.

    The 64 queries of an aligned block read the same blocks. They are chosen by some of these
    queries and by the keys before them, so that chunks and batches change nothing as long as a
    pass takes whole blocks. What follows the last whole block of a prompt reads everything.

    Attributes:
        samples: queries of a block whose attention to all keys is computed, evenly spaced, the
            last one included; 1 to 64.
        threshold: blocks are read, those with most attention first, until they hold this share of
            the attention of the samples.
        sinks: first blocks, which are always read.
        local: last blocks, the query's own included, which are always read; at least 1.
        dense: first layers that read everything. Layers with a window do, too.
        every: how all heads choose, unless `heads` says so. Rules other than MASS have positions
            in place of a threshold, and read the last others until that makes whole blocks.
        heads: how each query head of each layer chooses; empty: as `every` says.
    """

    samples: int = 4
    threshold: float = 0.92
    sinks: int = 1
    local: int = 4
    dense: int = 0
    every: HeadRule = HeadRule()
    heads: tuple[tuple[HeadRule, ...], ...] = ()

    @property
    def by_mass(self) -> bool:
        """Whether all heads choose by mass."""
        return not self.heads and self.every.rule == PrefillRule.MASS

    def of_layers(self, config: ModelConfig) -> list[list[HeadRule]]:
        """Return the rule of each query head of each layer.

        Raises:
            ModelError: `heads` are those of a model of another shape.
        """
        if not self.heads:
            return [[self.every] * layer.heads for layer in config.layers]
        found, expected = [len(layer) for layer in self.heads], [x.heads for x in config.layers]
        if found != expected:
            raise ModelError(
                f"the head profile is of {len(found)} layers with {sum(found)} query heads, but "
                f"this model has {len(expected)} with {sum(expected)}; make one for this model"
            )
        return [list(layer) for layer in self.heads]


def sampled_queries(samples: int) -> list[int]:
    """Return which queries of a block choose for it, the last one included."""
    return [(i + 1) * BLOCK // samples - 1 for i in range(samples)]


def sparse_end(prompt: int) -> int:
    """Return where the whole blocks end of a prompt of so many positions."""
    return prompt // BLOCK * BLOCK


def block_chunk(length: int, prompt: int, size: int) -> int:
    """Return how many tokens a pass takes behind `length` positions; see `Engine.prompt_chunk`."""
    if length + size >= sparse_end(prompt):
        return size
    return max((length + size) // BLOCK, length // BLOCK + 1) * BLOCK - length


def block_cut(length: int, prompt: int) -> int:
    """Return where a sequence can be cut; see `Engine.cut_point`."""
    return length if length >= sparse_end(prompt) else length // BLOCK * BLOCK


def check_blocks(length: int, nodes: int, prompt: int, chain: bool) -> None:
    """Refuse a pass that ends within a block of a prompt, or begins there.

    Raises:
        RequestError: as said.
    """
    end = length + nodes
    if length >= sparse_end(prompt):
        return
    whole = length % BLOCK == 0 and (end % BLOCK == 0 or end >= sparse_end(prompt))
    if not (chain and whole):
        raise RequestError(
            f"a prompt that reads some blocks only is run in whole blocks of {BLOCK} positions; "
            f"found positions {length} to {end}{'' if chain else ' as a tree'}"
        )

"""How prompts choose, in blocks of 64 positions, what they read."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import RequestError

BLOCK = 64  # positions of a block, of queries and of keys


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
    """

    samples: int = 4
    threshold: float = 0.92
    sinks: int = 1
    local: int = 4
    dense: int = 0


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

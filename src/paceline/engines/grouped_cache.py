"""Keys and values in 4 or 3 bits, in torch: what the native kernels are tested by.

Keys are rounded for each channel over 32 positions, values for each position over 32 channels, each
to a scale and a minimum in fp16. A group of 32 positions is rounded once all are committed: a node
at position p sees positions below p // 32 * 32 rounded, and the others of its path in fp16.

Based on Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv
2402.02750, section 3; the residual window is the group that is not full yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.core import TokenTree

GROUP = 32  # positions, or channels, that share a scale
_LARGEST = 65504.0  # of fp16


def to_half(rows: Tensor) -> Tensor:
    """Return numbers as fp16 holds them, beyond its range as its largest."""
    return rows.float().clamp(-_LARGEST, _LARGEST).half().to(rows.dtype)


def round_keys(keys: Tensor, bits: int) -> Tensor:
    """Return keys [..., 32 G, D] rounded for each channel over 32 positions."""
    groups = keys.reshape(*keys.shape[:-2], -1, GROUP, keys.shape[-1])
    return _round(groups, bits, -2).flatten(-3, -2)


def round_values(values: Tensor, bits: int) -> Tensor:
    """Return values [..., S, D] rounded for each position over 32 channels."""
    parts = torch.split(values, GROUP, -1)
    return torch.cat([_round(part, bits, -1) for part in parts], -1)


def rounded_rows(
    keys: Tensor, values: Tensor, bits: int, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows [H_kv, S, D] of which those below `end` are rounded; None: all full groups."""
    cut = keys.shape[1] // GROUP * GROUP if end is None else end
    return (
        torch.cat([round_keys(keys[:, :cut], bits), keys[:, cut:]], 1),
        torch.cat([round_values(values[:, :cut], bits), values[:, cut:]], 1),
    )


def _round(numbers: Tensor, bits: int, dim: int) -> Tensor:
    wide = numbers.float()
    low = to_half(wide.amin(dim, keepdim=True))
    step = to_half((wide.amax(dim, keepdim=True) - low) / (2**bits - 1))
    codes = ((wide - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    return (codes * step + low).to(numbers.dtype)


@dataclass(frozen=True)
class GroupedView:
    """Columns that the nodes of a tree see of a cache in groups, and who sees them.

    The columns are the rounded positions below the open group, the rows of the open group and of
    the nodes in fp16, and then 32 rounded rows for each group that a path fills.

    Attributes:
        open_from: where the open group begins.
        groups: int64 [C, 32], the rows that are rounded together: committed ones, then nodes.
        seen: bool [N, R + N + 32 C].
    """

    open_from: int
    groups: NDArray[np.int64]
    seen: NDArray[np.bool_]

    @classmethod
    def of(cls, tree: TokenTree, length: int, seen: NDArray[np.bool_]) -> GroupedView:
        """Return the view of a tree behind `length` rows, of which its nodes see `seen` [N, R+N].

        `seen` leaves out what the window of a layer hides.
        """
        open_from = length // GROUP * GROUP
        at = length + tree.depths().astype(np.int64)
        columns = np.concatenate([np.arange(length), at])
        rounded = columns[None] < (at // GROUP * GROUP)[:, None]
        below = columns < open_from
        own = np.eye(len(tree), dtype=bool)  # [node, ancestor or itself]
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                own[node] |= own[parent]
        groups, shown = [], [seen & (below[None] | ~rounded)]
        for end in np.flatnonzero((at + 1) % GROUP == 0):
            path = np.flatnonzero(own[end])
            rows = np.concatenate([np.arange(open_from, length), length + path])[-GROUP:]
            groups.append(rows)
            shown.append((seen & rounded)[:, rows] & own[:, end, None])
        return cls(open_from, np.array(groups, np.int64).reshape(-1, GROUP), np.hstack(shown))

    def extend(self, keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the columns, from those of rows [H_kv, R + N, D]."""
        groups = torch.from_numpy(self.groups.reshape(-1)).to(keys.device)
        held = rounded_rows(keys, values, bits, self.open_from)
        fresh = (round_keys(keys[:, groups], bits), round_values(values[:, groups], bits))
        return torch.cat([held[0], fresh[0]], 1), torch.cat([held[1], fresh[1]], 1)

"""Keys and values that are rounded in groups, in torch: what the native kernels are tested by.

A span of P positions is rounded once all are committed: a node at position p sees positions below
p // P * P rounded, and the others of its path in fp16. `grouped_rounding` says how; P is 32 for
int4 and int3, whose residual window (Liu et al., KIVI, arXiv 2402.02750, section 3) is the span
that is not full yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.core import TokenTree
from paceline.engines.grouped_rounding import round_keys, round_values
from paceline.engines.kv_formats import GroupedFormat


def rounded_rows(
    keys: Tensor, values: Tensor, form: GroupedFormat, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows [H_kv, S, D] of which those below `end` are rounded; None: all full spans."""
    cut = keys.shape[1] // form.span * form.span if end is None else end
    return (
        torch.cat([round_keys(keys[:, :cut], form), keys[:, cut:]], 1),
        torch.cat([round_values(values[:, :cut], form), values[:, cut:]], 1),
    )


@dataclass(frozen=True)
class GroupedView:
    """Columns that the nodes of a tree see of a cache in groups, and who sees them.

    The columns are the rounded positions below the open span, the rows of the open span and of the
    nodes in fp16, and then P rounded rows for each span that a path fills.

    Attributes:
        form: how they are rounded.
        open_from: where the open span begins.
        groups: int64 [C, P], the rows that are rounded together: committed ones, then nodes.
        seen: bool [N, R + N + C P].
    """

    form: GroupedFormat
    open_from: int
    groups: NDArray[np.int64]
    seen: NDArray[np.bool_]

    @classmethod
    def of(
        cls, tree: TokenTree, length: int, seen: NDArray[np.bool_], form: GroupedFormat
    ) -> GroupedView:
        """Return the view of a tree behind `length` rows, of which its nodes see `seen` [N, R+N].

        `seen` leaves out what the window of a layer hides.
        """
        span = form.span
        open_from = length // span * span
        at = length + tree.depths().astype(np.int64)
        columns = np.concatenate([np.arange(length), at])
        rounded = columns[None] < (at // span * span)[:, None]
        below = columns < open_from
        own = np.eye(len(tree), dtype=bool)  # [node, ancestor or itself]
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                own[node] |= own[parent]
        groups, shown = [], [seen & (below[None] | ~rounded)]
        for end in np.flatnonzero((at + 1) % span == 0):
            path = np.flatnonzero(own[end])
            rows = np.concatenate([np.arange(open_from, length), length + path])[-span:]
            groups.append(rows)
            shown.append((seen & rounded)[:, rows] & own[:, end, None])
        return cls(form, open_from, np.array(groups, np.int64).reshape(-1, span), np.hstack(shown))

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the columns, from those of rows [H_kv, R + N, D]."""
        groups = torch.from_numpy(self.groups.reshape(-1)).to(keys.device)
        held = rounded_rows(keys, values, self.form, self.open_from)
        fresh = (round_keys(keys[:, groups], self.form), round_values(values[:, groups], self.form))
        return torch.cat([held[0], fresh[0]], 1), torch.cat([held[1], fresh[1]], 1)

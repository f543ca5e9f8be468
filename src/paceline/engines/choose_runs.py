"""Which cached positions queries read by a `FewRead`, in torch: what the native kernels do, slowly.

Axes: N queries, S rows of keys, H query heads, G key/value heads, D head size, K runs of 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.engines.few_read import RUN, FewRead, HeadRead
from paceline.engines.representatives import run_scores
from paceline.errors import RequestError


def choose_runs(
    rule: FewRead,
    queries: Tensor,
    keys: Tensor,
    at: Tensor,
    held: Tensor,
    chain: bool,
    window: int | None,
    reads: Sequence[int],
    asked: Tensor | None = None,
) -> Tensor:
    """Return which rows each query may read, bool [H, N, S].

    Args:
        rule: how many are read, and how they are chosen.
        queries: [H, N, D], rotated and scaled.
        keys: [G, S, D], rotated: the committed rows, and behind them those of the pass.
        at: int64 [N], positions of the queries.
        held: int64 [S], positions of the rows.
        chain: the pass is a chain, so that all rows are in the order of their positions.
        window: positions that the layer shows; None: all.
        reads: one of `HeadRead` for each KV head.
        asked: queries of all rows, as `queries` [H, S, D]; for representatives only.

    Raises:
        RequestError: a tree ends beyond its local runs.
    """
    ordered = len(held) if chain else len(held) - len(at)
    own = at // RUN
    start = torch.zeros_like(at) if window is None else (at + 1 - window).clamp(min=0)
    near = (own + 1 - rule.local).clamp(min=0)
    if not chain and bool(((near + rule.following > ordered // RUN) & (near > 0)).any()):
        reach = (rule.local - rule.following) * RUN
        raise RequestError(
            f"a tree leaves the last {reach} positions, which are always read; take a "
            "smaller budget"
        )
    always = (held >= (near * RUN)[:, None]) | (held < rule.sinks * RUN)  # [N, S]
    first = (start // RUN).clamp(min=rule.sinks)
    runs = torch.arange(ordered // RUN, device=at.device)
    old = (runs >= first[:, None]) & (runs < near[:, None])  # [N, K]
    count = _chosen(rule, own + 1 - start // RUN, old.sum(1))
    if rule.top_k:
        best = _best_positions(queries, keys, old, start, count)
    else:
        best = _best_runs(rule, queries, keys, old, count, asked)
    chosen = always.expand(len(queries), -1, -1).clone()
    chosen[..., : best.shape[-1]] |= best
    group = len(queries) // len(keys)
    kinds = torch.tensor(list(reads), device=at.device).repeat_interleave(group)[:, None, None]
    chosen = torch.where(kinds == HeadRead.NEAR, always[None], chosen)
    return chosen | (kinds == HeadRead.ALL)


def _chosen(rule: FewRead, seen: Tensor, old: Tensor) -> Tensor:
    """Return how many old runs are read, int64 [N], of the runs seen and the old ones."""
    total = (seen.double() * rule.share).ceil().long().clamp(min=rule.least)
    return torch.minimum((total - (seen - old)).clamp(min=0), old)


def _best_runs(
    rule: FewRead, queries: Tensor, keys: Tensor, old: Tensor, count: Tensor, asked: Tensor | None
) -> Tensor:
    """Return the rows of the runs that promise most, bool [H, N, K * 16].

    A run's worth is the sum over a KV head's queries of the weight that its summary would have.
    """
    heads, runs = len(queries), old.shape[-1]
    group = heads // len(keys)
    if not runs or not bool(count.any()):
        return torch.zeros(heads, len(old), runs * RUN, dtype=torch.bool, device=old.device)
    rows = keys[:, : runs * RUN].reshape(len(keys), runs, RUN, -1).float()
    q = queries.float().reshape(len(keys), group * len(old), -1)  # [G, group * N, D]
    if asked is not None:
        scores = run_scores(rule, q, keys[:, : runs * RUN], asked)
    elif rule.summary == "bounds":
        high, low = rows.amax(2).mT, rows.amin(2).mT
        scores = q.clamp(min=0) @ high + q.clamp(max=0) @ low
    else:
        scores = q @ rows.mean(2).mT
        if rule.summary == "spread":  # the log of the mean weight, were the keys normal
            scores = scores + q.square() @ rows.var(2, correction=0).mT
    scores = scores.reshape(len(keys), group, len(old), runs).masked_fill(~old, -torch.inf)
    worth = scores.softmax(-1).nan_to_num(0).sum(1).masked_fill(~old, -1)  # [G, N, K]
    best = _first(worth, count) & old
    return best.repeat_interleave(RUN, -1).repeat_interleave(group, 0)


def _best_positions(
    queries: Tensor, keys: Tensor, old: Tensor, start: Tensor, count: Tensor
) -> Tensor:
    """Return the old rows with the largest scores, 16 for each run to choose, [H, N, K * 16]."""
    runs = old.shape[-1]
    rows = keys[:, : runs * RUN].repeat_interleave(len(queries) // len(keys), 0)
    scores = queries.float() @ rows.float().mT
    inside = old.repeat_interleave(RUN, -1)
    hidden = ~inside | (torch.arange(runs * RUN, device=old.device) < start[:, None])
    return _first(scores.masked_fill(hidden, -torch.inf), count * RUN) & inside


def _first(values: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` [N] largest of values [..., N, K]; of equals the earlier."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    marks = torch.arange(values.shape[-1], device=values.device) < count[:, None]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, marks.expand_as(order))

"""What a block of a prompt's queries reads in one head, in torch: see `PrefillRule`.

The native engine does the same in `native/engine/prefill_choice.cpp`.

Axes: D head size, S positions before the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.engines.sparse_prefill import (
    BLOCK,
    LEAF,
    HeadRule,
    PrefillRule,
    SparsePrefill,
    sampled_queries,
)


def choose_positions(
    rule: SparsePrefill, head: HeadRule, queries: Tensor, keys: Tensor, softcap: float | None
) -> Tensor:
    """Return which positions before its own block the block reads, bool [S].

    Args:
        rule: what all heads read, and how many queries choose.
        head: how this head chooses; not by mass.
        queries: [64, D] of one query head, rotated and scaled.
        keys: [S + 64, D], rotated: all before the block, and its own. S is a multiple of 64 and
            leaves something to choose from.
        softcap: cap of scores; None: there is none.
    """
    before = len(keys) - BLOCK
    begin, end = rule.sinks * BLOCK, before - (rule.local - 1) * BLOCK
    read = torch.ones(before, dtype=torch.bool, device=keys.device)
    read[begin:end] = False
    if head.rule == PrefillRule.A_SHAPE:
        read[max(begin, end - head.first) : end] = True
    elif head.rule == PrefillRule.VERTICAL_SLASH:
        columns, slashes = _lines(rule, queries, keys, softcap)
        _take_slashes(read, slashes, begin, end, head.second)
        _take_best(read, columns[:before].masked_fill(read, -torch.inf), begin, end, head.first)
    elif head.rule == PrefillRule.MEAN_BLOCKS:
        scores = _scores(queries.float().mean(0), keys[begin:end], softcap).double()
        sums = scores.reshape(-1, BLOCK).sum(-1)
        best = sums.argsort(descending=True, stable=True)[: head.first]
        read[begin:end].view(-1, BLOCK)[best] = True
    else:
        sampled = queries[sampled_queries(rule.samples)]
        scores = _scores(sampled, keys[begin:end], softcap)  # [samples, positions]
        runs = scores.amax(0).reshape(-1, LEAF).amax(-1)
        read[begin:end].view(-1, LEAF)[search_tree(runs, head.first)] = True
    _fill(read, begin, end)
    return read


def search_tree(scores: Tensor, count: int) -> Tensor:
    """Return `count` of the leaves with large `scores` [leaves], found by halving ranges of them.

    Begins with `count` equal ranges; each is halved, and of the halves those `count` are kept whose
    middle leaves have the largest scores, until ranges are single leaves. Returns all leaves where
    there are no more.
    """
    leaves = len(scores)
    if count >= leaves:
        return torch.arange(leaves, device=scores.device)
    ranges = [(i * leaves // count, (i + 1) * leaves // count) for i in range(count)]
    while any(end - begin > 1 for begin, end in ranges):
        halves = []
        for begin, end in ranges:
            middle = begin + (end - begin + 1) // 2
            halves += [(begin, middle)] + [(middle, end)] * (middle < end)
        middles = [begin + (end - begin) // 2 for begin, end in halves]
        best = scores[middles].argsort(descending=True, stable=True)[:count]
        ranges = sorted(halves[place] for place in best.tolist())
    return torch.tensor([begin for begin, _ in ranges], dtype=torch.int64, device=scores.device)


def _scores(queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    scores = queries.float() @ keys.float().mT
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _lines(
    rule: SparsePrefill, queries: Tensor, keys: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the attention of the samples to each position and to each distance, [S + 64] each."""
    at = torch.arange(len(keys), device=keys.device)
    columns = torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
    slashes = torch.zeros_like(columns)
    for node in sampled_queries(rule.samples):
        position = len(keys) - BLOCK + node
        scores = _scores(queries[node], keys, softcap).masked_fill(at > position, -torch.inf)
        mass = scores.softmax(-1).double()
        columns += mass
        slashes[: position + 1] += mass[: position + 1].flip(0)
    return columns, slashes


def _take_slashes(read: Tensor, slashes: Tensor, begin: int, end: int, positions: int) -> None:
    """Mark what the distances with most attention reach, until `positions` are marked."""
    root = len(read)
    nearest, farthest = root - end + 1, root + BLOCK - 1 - begin
    order = slashes[nearest : farthest + 1].argsort(descending=True, stable=True) + nearest
    already = int(read[begin:end].sum())
    for distance in order.tolist():
        if int(read[begin:end].sum()) - already >= positions:
            break
        read[max(begin, root - distance) : min(end, root + BLOCK - distance)] = True


def _take_best(read: Tensor, values: Tensor, begin: int, end: int, count: int) -> None:
    """Mark the positions with the largest values, where values of marked ones are -inf."""
    best = values[begin:end].argsort(descending=True, stable=True)
    read[begin:end][best[: min(count, int((~read[begin:end]).sum()))]] = True


def _fill(read: Tensor, begin: int, end: int) -> None:
    """Mark the last unmarked positions until all that is marked makes whole blocks."""
    left = -int(read[begin:end].sum()) % BLOCK
    unread = (~read[begin:end]).nonzero()[:, 0]
    if left:
        read[begin:end][unread[-left:]] = True

"""Which blocks of a prompt its queries read, in torch: what the native engine does, slowly.

Axes: N queries, S rows of keys, H query heads, G key/value heads, D head size, K blocks of 64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.engines.choose_positions import choose_positions
from paceline.engines.sparse_prefill import (
    BLOCK,
    HeadRule,
    PrefillRule,
    SparsePrefill,
    sampled_queries,
    sparse_end,
)


def choose_blocks(
    rule: SparsePrefill,
    queries: Tensor,
    keys: Tensor,
    at: Tensor,
    held: Tensor,
    prompt: int,
    softcap: float | None,
    heads: Sequence[HeadRule],
) -> Tensor:
    """Return which rows each query may read, bool [H, N, S]; of those before it, all or some.

    Args:
        rule: how blocks are chosen.
        queries: [H, N, D], rotated and scaled, of whole blocks up to the prompt's last one.
        keys: [G, S, D], rotated, in the order of their positions.
        at: int64 [N], positions of the queries.
        held: int64 [S], positions of the rows.
        prompt: positions below it are those of a prompt.
        softcap: cap of scores; None: there is none.
        heads: how each query head chooses.
    """
    mass = torch.tensor([head.rule == PrefillRule.MASS for head in heads], device=at.device)
    read = torch.ones(len(queries), len(at), len(held), dtype=torch.bool, device=at.device)
    rows = keys.repeat_interleave(len(queries) // len(keys), 0).float()
    begin = int(at[0])
    for first in range(0, min(len(at), sparse_end(prompt) - begin), BLOCK):
        own = (begin + first) // BLOCK
        if own + 1 <= rule.sinks + rule.local:
            continue
        for place, head in enumerate(heads):
            if head.rule != PrefillRule.MASS:
                asked = queries[place, first : first + BLOCK]
                chosen = choose_positions(
                    rule, head, asked, rows[place, : (own + 1) * BLOCK], softcap
                )
                read[place, first : first + BLOCK, : own * BLOCK] = chosen
        if rule.threshold >= 1 or not bool(mass.any()):
            continue
        sampled = [first + node for node in sampled_queries(rule.samples)]
        scores = queries[:, sampled].float() @ rows.mT  # [H, samples, S]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(held > at[sampled][:, None], -torch.inf)
        given = scores.softmax(-1)[..., : (own + 1) * BLOCK].double().sum(1)  # [H, S]
        shares = given.reshape(len(given), own + 1, BLOCK).sum(-1)
        best = _best(rule, shares, own).repeat_interleave(BLOCK, -1)[:, None]
        part = read[:, first : first + BLOCK, : (own + 1) * BLOCK]
        part[mass] = best.expand_as(part)[mass]
    return read


def _best(rule: SparsePrefill, shares: Tensor, own: int) -> Tensor:
    """Return which blocks up to block `own` are read, bool [H, K], of their `shares` [H, K]."""
    blocks = torch.arange(own + 1, device=shares.device)
    always = (blocks < rule.sinks) | (blocks + rule.local > own)
    ranked = shares.masked_fill(always, torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    held = shares.gather(-1, order).cumsum(-1)
    before = held - shares.gather(-1, order)  # what better blocks hold
    wanted = (before < rule.threshold * rule.samples) | always.gather(0, order.flatten()).view_as(
        order
    )
    return torch.zeros_like(wanted).scatter_(-1, order, wanted)

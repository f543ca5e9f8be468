"""How keys that stand for a run of 16 positions promise its weight, in torch.

Axes: N queries, S rows in order, H query heads, G key/value heads, D head size, K runs of 16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paceline.engines.few_read import RUN, FewRead


def run_scores(rule: FewRead, asking: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """Return the logarithm of the weight that each run promises to a query, [G, A, K].

    The keys of a run that the queries of the `following` runs score highest, together, stand for
    themselves, and the mean of its other keys for the others. Runs that fewer runs follow get
    some score, too.

    Args:
        rule: says how many keys stand for themselves.
        asking: [G, A, D], of A queries of the heads that share keys.
        keys: [G, K * 16, D].
        queries: of the rows in order, [H, S, D] with S at least K * 16.
    """
    heads, count = len(keys), keys.shape[1] // RUN
    rows = keys.reshape(heads, count, RUN, -1).float()
    sums = queries[:, : count * RUN].double().reshape(heads, -1, count, RUN, keys.shape[-1])
    ends = sums.sum((1, 3)).cumsum(1)  # [G, K, D]
    runs = torch.arange(count, device=keys.device)
    wanted = ends[:, (runs + rule.following).clamp(max=count - 1)] - ends  # of those behind a run
    received = (rows.double() * wanted[:, :, None]).sum(-1)  # [G, K, 16]
    order = received.argsort(dim=-1, descending=True, stable=True)[..., None]
    ordered = rows.gather(2, order.expand_as(rows))
    chosen, others = ordered[:, :, : rule.representatives], ordered[:, :, rule.representatives :]
    scores = [torch.einsum("gad,gkd->gak", asking, each) for each in chosen.unbind(2)]
    if others.shape[2]:
        mean = others.mean(2)
        scores.append(torch.einsum("gad,gkd->gak", asking, mean) + math.log(others.shape[2]))
    return torch.stack(scores).logsumexp(0)

"""Which positions of a prompt queries read by the centroids of its keys, in torch.

Axes: N queries, S rows of keys, H query heads, G key/value heads, D head size, P positions of the
prompt, C clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.engines.few_read import RUN, FewRead
from paceline.engines.read_memory import Clusters

_ROUNDS = 10  # of k-means
_WIDER = 2  # positions of the best coarse clusters, over those that are read
_CENTROIDS_OF_TOP = 8  # centroids for each coarse cluster


def choose_clusters(
    rule: FewRead,
    queries: Tensor,
    clusters: Clusters,
    at: Tensor,
    held: Tensor,
    window: int | None,
) -> Tensor:
    """Return which rows each query may read, bool [H, N, S].

    Positions behind the clustered ones, the first and the last ones are read; of the others those
    whose centroids have the largest products with the query, for each query head, of equals the
    earlier.

    Args:
        rule: how many are read.
        queries: [H, N, D], rotated and scaled.
        clusters: of the prompt's keys.
        at: int64 [N], positions of the queries.
        held: int64 [S], positions of the rows; those of the prompt are first, in order.
        window: positions that the layer shows; None: all.
    """
    prompt, group = clusters.prompt, len(queries) // len(clusters.labels)
    start = torch.zeros_like(at) if window is None else (at + 1 - window).clamp(min=0)
    near = (at // RUN + 1 - rule.local).clamp(min=0) * RUN
    always = (held >= near[:, None]) | (held < rule.sinks * RUN) | (held >= prompt)  # [N, S]
    places = torch.arange(prompt, device=at.device)
    old = (places >= start[:, None]) & ~always[:, :prompt]  # [N, P]
    seen = at + 1 - start
    total = (seen.double() * rule.share).ceil().long().clamp(min=rule.least * RUN)
    count = torch.minimum((total - (seen - old.sum(1))).clamp(min=0), old.sum(1))
    own = queries.float()
    labels = clusters.labels.repeat_interleave(group, 0)[:, None].expand(-1, len(at), -1)
    allowed = old.expand(len(queries), -1, -1)
    if clusters.tops is not None and clusters.parents is not None:
        coarse = clusters.parents.gather(1, clusters.labels).repeat_interleave(group, 0)
        scores = own @ clusters.tops.repeat_interleave(group, 0).mT
        scores = scores.gather(2, coarse[:, None].expand(-1, len(at), -1))
        allowed = allowed & _best_tops(scores, allowed, count * _WIDER)
    scores = (own @ clusters.centroids.repeat_interleave(group, 0).mT).gather(2, labels)
    read = always.expand(len(queries), -1, -1).clone()
    read[..., :prompt] |= _best(scores, allowed, count)
    return read


def _best(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` [N] allowed places with the largest scores [H, N, P]."""
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    marks = torch.arange(scores.shape[-1], device=scores.device) < count[:, None]
    best = torch.zeros_like(allowed).scatter_(-1, order, marks.expand_as(order))
    return best & allowed


def _best_tops(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """Mark the places [H, N, P] of the best coarse clusters that hold `count` [N] or more."""
    hidden = scores.masked_fill(~allowed, -torch.inf)
    last = (count - 1).clamp(min=0, max=scores.shape[-1] - 1)[None, :, None]
    ranked = hidden.sort(dim=-1, descending=True).values
    return scores >= ranked.gather(2, last.expand(len(scores), -1, -1))


def cluster_keys(rule: FewRead, keys: Tensor) -> Clusters:
    """Return the clusters of keys [G, P, D]."""
    prompt = keys.shape[1]
    keys = keys.float()
    labels, centroids = _k_means(keys, max(1, math.ceil(rule.clusters * prompt)))
    if rule.levels == 1:
        return Clusters(prompt, labels, centroids)
    parents, tops = _k_means(centroids, -(-centroids.shape[1] // _CENTROIDS_OF_TOP))
    return Clusters(prompt, labels, centroids, parents, tops)


def _k_means(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the clusters of points [G, P, D] by direction, and the means of these [G, C, D].

    Starts from evenly spaced points, so that it depends on nothing but them. An empty cluster keeps
    its direction, and no point has its label.
    """
    directions = F.normalize(points, dim=-1)
    places = torch.arange(count, device=points.device)
    first = places * (points.shape[1] - 1) // max(count - 1, 1)
    centres = directions[:, first]
    for _ in range(_ROUNDS):
        labels = (directions @ centres.mT).argmax(-1)
        sums = _sums(directions, labels, count)
        centres = torch.where(sums.any(-1, keepdim=True), F.normalize(sums, dim=-1), centres)
    labels = (directions @ centres.mT).argmax(-1)
    sizes = torch.zeros(len(points), count, device=points.device)
    sizes.scatter_add_(1, labels, torch.ones_like(labels, dtype=sizes.dtype))
    return labels, _sums(points, labels, count) / sizes.clamp(min=1)[..., None]


def _sums(points: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the sum of the points [G, P, D] of each cluster, [G, C, D]."""
    sums = torch.zeros(len(points), count, points.shape[-1], device=points.device)
    return sums.scatter_add_(1, labels[..., None].expand_as(points), points)

"""Attention of heads that read earlier states, with a learnt bias for each distance.

Axes: B texts, T positions of a text, S positions that are read, H heads, D hidden size.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import HeadBatch

_HEAD_DIM = 64  # the largest common divisor with D is taken


def head_count(size: int) -> int:
    """Return the number of attention heads for a hidden size."""
    return size // gcd(size, _HEAD_DIM)


def norm(x: Tensor) -> Tensor:
    """Scale the last axis to a root mean square of 1."""
    from torch.nn import functional as F

    return F.rms_norm(x, x.shape[-1:])


def neighbours(batch: HeadBatch, run: int, window: int) -> tuple[Tensor, Tensor]:
    """Return which positions of a batch's runs read which.

    Args:
        batch: positions, runs of `run` neighbours one behind the other.
        run: T.
        window: farthest distance that is read.

    Returns:
        distances from row to column, int64 [T, T], and float32 [B, 1, T, T], 0 where the column is
        read and -inf where it is of another text, too far or later.
    """
    import torch

    device = batch.hidden.device
    place = torch.arange(run, device=device)
    distance = place[:, None] - place
    at = torch.arange(len(batch.hidden), device=device) if batch.at is None else batch.at
    text = at.view(-1, run) - place  # the same for neighbours of one text
    seen = (distance >= 0) & (distance <= window) & (text[:, :, None] == text[:, None])
    unseen = torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)
    return distance, unseen[:, None]


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    own: list[tuple[Tensor, Tensor]] | None = None,
    nearer: Tensor | None = None,
) -> Tensor:
    """Return what positions read, [B, T, D].

    Args:
        queries: [B, T, D].
        keys: [B, S, D], of positions that several of the T read.
        values: likewise.
        bias: [..., H, T, S], added to the scores; -inf where a position is not read.
        own: keys and values [B, T, D] that only the position in the same place reads.
        nearer: [1, H, 1, len(own)], added to their scores.
    """
    import torch

    count = bias.shape[-3]
    dim = queries.shape[-1] // count

    def split(x: Tensor) -> Tensor:  # [B, T, D] -> [B, H, T, dim]
        return x.view(*x.shape[:-1], count, dim).transpose(-2, -3)

    query = split(queries) / dim**0.5
    scores = query @ split(keys).transpose(-1, -2) + bias  # [B, H, T, S]
    length = scores.shape[-1]
    if own and nearer is not None:
        beside = [(query * split(key)).sum(-1, keepdim=True) for key, _ in own]
        scores = torch.cat([scores, torch.cat(beside, -1) + nearer], -1)
    shares = scores.softmax(-1)
    mixed: Tensor = shares[..., :length] @ split(values)
    for index, (_, value) in enumerate(own or ()):
        mixed = mixed + shares[..., length + index, None] * split(value)
    return mixed.transpose(-2, -3).flatten(-2)

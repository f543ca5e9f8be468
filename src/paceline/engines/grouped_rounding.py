"""How keys and values are rounded in groups of positions, in torch.

Keys are rounded for each channel over some positions, values for each position over some channels,
each to a scale and a minimum in fp16.

Based on Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv
2402.02750, section 3. With a rank or outliers: Kang et al., GEAR: An Efficient KV Cache Compression
Recipe for Near-Lossless Generative Inference of LLM, arXiv 2403.05527, section 3: outliers are
taken out before the others are rounded, and a product of low rank is added that approximates the
errors of a head, by power iteration (algorithm 2).

Axes: H KV heads, S positions, D head size, C spans of P positions, G scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.engines.kv_formats import GroupedFormat

_LARGEST = 65504.0  # of fp16
_ITERATIONS = 4  # of the power method


def to_half(rows: Tensor) -> Tensor:
    """Return numbers as fp16 holds them, beyond its range as its largest."""
    return rows.float().clamp(-_LARGEST, _LARGEST).half().to(rows.dtype)


def round_keys(keys: Tensor, form: GroupedFormat) -> Tensor:
    """Return keys [H, C P, D] rounded for each channel over `form.group` positions."""
    heads, count, size = keys.shape
    group = form.group or form.span
    spans = keys.float().reshape(heads, count // form.span, form.span, size)
    kept = _within(spans, form.outliers_of(form.span), 2)
    shape = (heads, count // group, group, size)
    coarse = _round(spans.reshape(shape), kept.reshape(shape), form.bits, 2)
    return _with_errors(spans, coarse.reshape(spans.shape), kept, form).reshape_as(keys).to(keys)


def round_values(values: Tensor, form: GroupedFormat) -> Tensor:
    """Return values [H, C P, D] rounded for each position over `form.group` channels of a head."""
    heads, count, size = values.shape
    rows = values.float().transpose(0, 1).reshape(count, heads * size)
    kept = _within(rows, form.outliers_of(heads * size), 1)
    group, numbers, marked = heads * size, rows, kept
    if form.group:
        shape = (count, heads, size)
        group, numbers, marked = form.group, rows.reshape(shape), kept.reshape(shape)
    parts = zip(torch.split(numbers, group, -1), torch.split(marked, group, -1), strict=True)
    coarse = torch.cat([_round(part, mark, form.bits, -1) for part, mark in parts], -1)
    spans = (heads, count // form.span, form.span, size)
    whole, rough, marked = (
        each.reshape(count, heads, size).transpose(0, 1).reshape(spans)
        for each in (rows, coarse, kept)
    )
    return _with_errors(whole, rough, marked, form).reshape_as(values).to(values)


def _round(numbers: Tensor, kept: Tensor, bits: int, dim: int) -> Tensor:
    """Return numbers on a grid between the smallest and the largest of those that are `kept`."""
    low = to_half(_edge(numbers, kept, dim, False))
    step = to_half((_edge(numbers, kept, dim, True) - low) / (2**bits - 1))
    codes = ((numbers - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * step + low


def _edge(numbers: Tensor, kept: Tensor, dim: int, largest: bool) -> Tensor:
    """Return the smallest or largest number that is kept; 0 where none is."""
    none = float("-inf" if largest else "inf")
    masked = numbers.masked_fill(~kept, none)
    edge = masked.amax(dim, keepdim=True) if largest else masked.amin(dim, keepdim=True)
    return edge.masked_fill(edge == none, 0.0)


def _within(numbers: Tensor, count: int, dim: int) -> Tensor:
    """Mark all numbers but the `count` smallest and the `count` largest along a dimension."""
    kept = torch.ones_like(numbers, dtype=torch.bool)
    if count:
        order = numbers.sort(dim=dim, stable=True).indices
        last = numbers.shape[dim] - count
        kept.scatter_(dim, order.narrow(dim, 0, count), False)
        kept.scatter_(dim, order.narrow(dim, last, count), False)
    return kept


def _with_errors(numbers: Tensor, coarse: Tensor, kept: Tensor, form: GroupedFormat) -> Tensor:
    """Return rounded spans [H, C, P, D] with a low rank of their errors, and outliers in fp16."""
    if form.rank:
        coarse = coarse + low_rank((numbers - coarse).masked_fill(~kept, 0.0), form.rank)
    return torch.where(kept, coarse, to_half(numbers))


def low_rank(errors: Tensor, rank: int) -> Tensor:
    """Return products [..., P, D] of two fp16 factors of a rank that approximate `errors`."""
    rank = min(rank, *errors.shape[-2:])
    start = torch.Generator().manual_seed(0)
    right = torch.randn(errors.shape[-1], rank, generator=start).to(errors)
    for _ in range(_ITERATIONS):
        left = torch.linalg.qr(errors @ right)[0]
        right = errors.mT @ left
    return to_half(left) @ to_half(right).mT

"""HyperAttention: near-linear attention by sorted hashes of keys, and a sample of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import numpy as np

from paceline.attention.base import BLOCK, Pattern
from paceline.core import Exactness
from paceline.errors import MethodError, RequestError
from paceline.registry import Source, check_range, patterns

if TYPE_CHECKING:
    from torch import Tensor

_SEED = 2310


@patterns.register("hyper_attention", Exactness.LOSSY)
@dataclass(frozen=True)
class HyperAttention(Pattern):
    """Read keys whose hashes are near a query's, and a uniform sample that stands for the others.

    The positions before a query's last ones are cut into aligned parts of halving sizes, as the
    recursion over causal halves cuts them. In each part keys are sorted by a hash of their
    direction; a query reads the `block` keys among which its own hash falls, and `sample` random
    ones, weighted so that they estimate all others. Parts that are not larger than both are read in
    full. Prompts and decoding alike.

    Attributes:
        block: keys of a part that a query reads by its hash. Default 256, as in the paper.
        sample: random keys of a part. Default 256, as in the paper; 0: what is not near counts for
            nothing.
        local: last positions that are read in full, at least; a multiple of 64. Default 1024.
        bits: of a hash, random directions that it compares with; 1 to 16. Default 7.
    """

    source = Source(
        authors="Han et al.",
        title="HyperAttention: Long-context Attention in Near-Linear Time",
        arxiv="2310.05869",
        section="3, algorithms 1 to 4",
        note="queries are placed among the sorted keys by their hashes; the paper sorts the "
        "queries of a half, too, of which a chunk or a tree holds a part only",
    )
    catalogue = (299,)
    missing = {299: "kernels that save the time: the reference engine hides what is not read"}
    examples = ("hyper_attention", "hyper_attention:block=16,sample=8,local=64,bits=4")

    block: int = 256
    sample: int = 256
    local: int = 1024
    bits: int = 7

    def __post_init__(self) -> None:
        check_range(1, 1 << 20, self.name, block=self.block)
        check_range(0, 1 << 20, self.name, sample=self.sample)
        check_range(BLOCK, 1 << 30, self.name, local=self.local)
        check_range(1, 16, self.name, bits=self.bits)
        if self.local % BLOCK:
            raise MethodError(f"{self.name}:local is {self.local}, expected a multiple of {BLOCK}")

    def mask(
        self, layer: int, queries: Tensor, keys: Tensor, at: Tensor, held: Tensor, chain: bool
    ) -> Tensor:
        """Return what is added to the score of each query with each row, float [H, N, S].

        Raises:
            RequestError: a tree is deeper than the local positions.
        """
        import torch

        far = (at + 1 - self.local).clamp(min=0) // self.local * self.local  # [N], where it ends
        ordered = len(held) if chain else len(held) - len(at)
        if int(far.max()) > ordered:
            raise RequestError(
                f"{self.name} needs trees that end within its {self.local} local positions; take a "
                "smaller budget"
            )
        bias = torch.zeros(len(queries), len(at), len(held), device=queries.device)
        directions = self._directions(keys)
        hashes = self._hashes(keys, directions).repeat_interleave(len(queries) // len(keys), 0)
        asked = self._hashes(queries, directions)  # [H, N]
        for end in sorted(set(far.tolist())):
            rows = (far == end).nonzero()[:, 0]
            for first, size in self._parts(end):
                if size > self.block + self.sample:
                    part = slice(first, first + size)
                    bias[:, rows, part] = self._part(asked[:, rows], hashes[:, part], first)
        return bias

    def _parts(self, end: int) -> list[tuple[int, int]]:
        """Return begin and size of the aligned parts before `end`, the largest first."""
        parts, begin, units = [], 0, end // self.local
        for bit in reversed(range(units.bit_length())):
            if units >> bit & 1:
                parts.append((begin, self.local << bit))
                begin += self.local << bit
        return parts

    def _directions(self, keys: Tensor) -> Tensor:
        """Return the directions that hashes compare with, float32 [D, bits]."""
        import torch

        drawn = np.random.default_rng(_SEED).standard_normal((keys.shape[-1], self.bits))
        return torch.from_numpy(drawn.astype(np.float32)).to(keys.device)

    def _hashes(self, vectors: Tensor, directions: Tensor) -> Tensor:
        """Return the bucket of each vector, int64 [H, S]: neighbours differ in one direction."""
        import torch

        signs = (vectors.float() @ directions > 0).long()
        ones = signs.cumsum(-1) % 2  # from a Gray code to the number that it stands for
        weights = 1 << torch.arange(self.bits - 1, -1, -1, device=vectors.device)
        return (ones * weights).sum(-1)

    def _part(self, asked: Tensor, hashes: Tensor, first: int) -> Tensor:
        """Return the bias of queries of hashes [H, N] with a part of keys of hashes [H, S]."""
        import torch

        size = hashes.shape[-1]
        ordered, order = hashes.sort(dim=-1, stable=True)
        asked = asked.contiguous()
        left = torch.searchsorted(ordered, asked)
        right = torch.searchsorted(ordered, asked, right=True)
        middle = (left + right) // 2  # [H, N], where a query stands among the keys
        begin = (middle - self.block // 2).clamp(0, size - self.block)
        places = torch.empty_like(order)
        rank = torch.arange(size, device=order.device).expand_as(order)
        places.scatter_(-1, order, rank)  # of each key in the order
        away = places[:, None] - begin[..., None]  # [H, N, S]
        near = (away >= 0) & (away < self.block)
        bias = torch.full(near.shape, -torch.inf, device=order.device)
        if self.sample:
            drawn = np.random.default_rng((_SEED, first, size)).permutation(size)[: self.sample]
            bias[..., torch.from_numpy(drawn).to(order.device)] = log(size / self.sample)
        return bias.masked_fill(near, 0.0)

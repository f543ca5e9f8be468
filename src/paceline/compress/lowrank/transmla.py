"""TransMLA: keys and values of one latent, which is cached in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.lowrank.base import store
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, factorizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@factorizers.register("transmla", Exactness.LOSSY)
@dataclass(frozen=True)
class TransMLA(WeightCompressor):
    """Compute keys and values of a position from one latent vector (multi-head latent attention).

    The matrices of keys and values become products with one right factor, which makes the latent.
    The reference engine caches the latent and computes keys and values from it, rotary embedding
    behind; where the latent is smaller than they are, the cache is, too. Other matrices stay.

    With `cache=1` the conversion is exact: the latent of grouped-query attention is keys and values
    themselves; where these are larger than the hidden state, as in multi-head attention, it is the
    hidden state, which halves the cache. Below, the latent is the one that loses least of keys and
    values on the calibration texts, both in units of their own energy.

    Attributes:
        cache: numbers of the latent, as a share of those of keys and values, above 0 and up to 1.
            Default 1.
    """

    cache: float = 1.0

    source = Source(
        authors="Meng et al.",
        title="TransMLA: Multi-head Latent Attention Is All You Need",
        arxiv="2502.07864",
        section="section 4",
        note="keys are computed before the rotary embedding, which is not absorbed; no training",
    )
    catalogue = (314,)
    missing = {314: "the native engine caches keys and values; no training of the new matrices"}
    examples = ("transmla:cache=0.75", "transmla")
    statistics = frozenset({Statistic.SECOND_MOMENT})
    alone: ClassVar[bool] = True
    plain_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(0.001, 1.0, self.name, cache=self.cache)

    def for_block(
        self, weights: Mapping[str, Tensor], stats: Mapping[str, Statistics]
    ) -> Mapping[str, WeightCompressor]:
        """Factor keys and values together; the other matrices are left out."""
        missing = {"k", "v"} - weights.keys()
        if not weights.keys() & {"q", "k", "v", "o"}:
            return {}  # a layer without attention
        if missing:
            raise MethodError(
                f"{self.name} factors keys and values together, and its rule leaves out "
                f"{' and '.join(sorted(missing))}; match both, e.g. layers.*.[kv]"
            )
        k, v = weights["k"], weights["v"]
        numbers = len(k) + len(v)
        rank = max(1, round(self.cache * numbers))
        if rank < min(numbers, k.shape[1]):
            parts = _closest(k, v, stats["k"], rank)
        else:
            parts = _exact(k, v)
        return {name: _Made(part) for name, part in zip("kv", parts, strict=True)}

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """Refuse single matrices, as `for_block` factors two together."""
        raise MethodError(f"{self.name} factors keys and values of a block, not single matrices")


@dataclass(frozen=True)
class _Made(WeightCompressor):
    """A stored form that is there already.

    Attributes:
        stored: of the matrix.
    """

    stored: Linear

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        return self.stored


def _exact(k: Tensor, v: Tensor) -> tuple[Linear, Linear]:
    """Return products that are the matrices themselves: the smaller factor is an identity."""
    import torch

    from paceline.models.tensors import LowRank

    inputs = k.shape[1]
    if len(k) + len(v) < inputs:
        rows = torch.eye(len(k) + len(v))
        latent: Linear = _keep(torch.cat((k, v)))
        return LowRank(_select(rows[: len(k)]), latent), LowRank(_select(rows[len(k) :]), latent)
    latent = _select(torch.eye(inputs))
    return LowRank(_keep(k), latent), LowRank(_keep(v), latent)


def _closest(k: Tensor, v: Tensor, stats: Statistics, rank: int) -> tuple[Linear, Linear]:
    """Return products of a rank with one right factor that are closest on the inputs."""
    import torch

    from paceline.models.tensors import LowRank

    root, inverse = stats.whitener
    scales = [1 / float((matrix @ root).norm().clamp(min=1e-30)) for matrix in (k, v)]
    both = torch.cat((k * scales[0], v * scales[1])) @ root
    left, values, right = torch.linalg.svd(both, full_matrices=False)
    sizes = values[:rank].sqrt()
    latent = store((sizes[:, None] * right[:rank]) @ inverse, 16)
    up = left[:, :rank] * sizes
    parts = up[: len(k)] / scales[0], up[len(k) :] / scales[1]
    first, second = (LowRank(store(part, 16), latent) for part in parts)
    return first, second


def _select(rows: Tensor) -> Linear:
    """Return rows of an identity matrix as a bitmap."""
    import numpy as np

    from paceline.models.tensors import Sparse

    mask = rows.numpy() != 0
    return Sparse(mask, np.ones(int(mask.sum()), np.float16), "F16")


def _keep(matrix: Tensor) -> Linear:
    """Return a matrix in the smallest type that holds it exactly."""
    from paceline.models.tensors import narrowest

    return narrowest(matrix.numpy())

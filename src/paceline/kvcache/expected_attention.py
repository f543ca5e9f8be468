"""Expected attention: rows by what queries to come will give them, and by their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.engines.base import Engine
from paceline.errors import MethodError
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.models.rope import Rope
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("expected_attention", Exactness.LOSSY)
@dataclass(frozen=True)
class ExpectedAttention(ScoringPolicy):
    """Keep the rows that coming queries are expected to attend to.

    Queries before their rotation are taken as normally distributed, with the mean and the
    covariance of the last ones. Rotated by the mean rotation of the coming positions, they give
    each key an expected share of attention, exp(k m + k C k / 2), which is averaged over the query
    heads of a group. The share plus `epsilon` is multiplied by the norm of the row's value: where
    no attention is expected, the norm decides. Does not look at what is asked last, so that it
    suits text that is read once and asked about later.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept, and whose queries do not count. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64.
        window: last positions whose queries count, 2 to 4096. Default 256: with more, their
            storage outweighs what it improves.
        future: coming positions over which rotations are averaged, 1 to 65536. Default 512.
        epsilon: added to each share before it is multiplied by the norm, 0 to 1. Default 0.01:
            with 0, numbers in a text of 2,048 tokens are forgotten more often than by chance.
    """

    source = Source(
        authors="Devoto et al.",
        title="Expected Attention: KV Cache Compression by Estimating Attention from Future "
        "Queries Distribution",
        arxiv="2510.00636",
        section="section 3",
        note="statistics of the last queries, not of all, as the cache is bounded all along",
    )
    needs = frozenset({Ability.EVICT, Ability.KEYS, Ability.QUERIES})
    examples = ("expected_attention", "expected_attention:budget=24,recent=8,every=8,window=16")

    recent: int = 64
    window: int = 256
    future: int = 512
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(2, 4096, self.name, window=self.window)
        check_range(1, 65536, self.name, future=self.future)
        check_range(0.0, 1.0, self.name, epsilon=self.epsilon)

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.window

    def check(self, engine: Engine) -> None:
        """Refuse, besides what `Policy.check` does, models whose queries are normed when rotated.

        Raises:
            MethodError: the rotation of their queries cannot be taken back.
        """
        super().check(engine)
        if engine.config.qk_norm == "rotated":
            raise MethodError(
                f"{self.name} takes back the rotation of queries, which this model norms behind "
                "it; take another KV policy, e.g. keydiff"
            )

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        assert layer.keys is not None
        assert layer.values is not None
        shape = layer.shape
        mean, covariance = self._coming_queries(layer)
        keys = np.repeat(layer.keys.astype(np.float64), shape.heads // shape.kv_heads, 0)
        scores = np.einsum("hsd,hd->hs", keys, mean)
        scores += ((keys @ covariance) * keys).sum(-1) / 2  # [H, S]
        away = np.repeat(layer.positions < self.sinks, shape.heads // shape.kv_heads, 0)
        scores[away] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        grouped = shares.reshape(shape.kv_heads, -1, shares.shape[-1]).mean(1)
        norms = np.linalg.norm(layer.values.astype(np.float64), axis=-1)
        result: Scores = (grouped + self.epsilon) * norms
        return result

    def _coming_queries(self, layer: LayerCache) -> tuple[Scores, Scores]:
        """Return mean [H, D] and covariance [H, D, D] of coming queries, rotated and scaled."""
        assert layer.queries is not None
        queries = layer.queries[:, -self.window :].astype(np.float64)
        first = layer.length - queries.shape[1]
        skipped = min(max(0, self.sinks - first), queries.shape[1] - 1)
        queries, first = queries[:, skipped:], first + skipped
        rope = layer.shape.rope
        if rope is not None:
            queries = _turned_back(queries, rope, first)
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        covariance = centred.transpose(0, 2, 1) @ centred / queries.shape[1]
        if rope is None:
            return mean, covariance
        turn = _mean_rotation(rope, layer.length, self.future, queries.shape[-1])
        return mean @ turn.T, turn @ covariance @ turn.T


def _pairs(rope: Rope) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the two values of a head that each frequency turns together."""
    half = rope.dim // 2
    if rope.adjacent:
        return np.arange(0, rope.dim, 2), np.arange(1, rope.dim, 2)
    return np.arange(half), np.arange(half, rope.dim)


def _rotations(rope: Rope, start: int, count: int) -> np.ndarray:
    """Return the rotations of positions as complex numbers [count, dim / 2]."""
    cosines, sines = rope.table(start, start + count)
    result: np.ndarray = cosines + 1j * sines.astype(np.float64)
    return result


def _turned_back(queries: Scores, rope: Rope, start: int) -> Scores:
    """Return queries [H, W, D] of positions from `start` on as they were before their rotation."""
    one, other = _pairs(rope)
    turned = queries[..., one] + 1j * queries[..., other]
    plain = turned / _rotations(rope, start, queries.shape[1])
    result = queries.copy()
    result[..., one], result[..., other] = plain.real, plain.imag
    return result


def _mean_rotation(rope: Rope, start: int, count: int, dim: int) -> Scores:
    """Return the mean rotation of positions as a matrix [D, D]."""
    one, other = _pairs(rope)
    mean = _rotations(rope, start, count).mean(0)
    matrix = np.eye(dim)
    matrix[one, one] = matrix[other, other] = mean.real
    matrix[one, other], matrix[other, one] = -mean.imag, mean.imag
    return matrix

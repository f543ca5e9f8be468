"""Basis-aware truncation: keep improbable tokens that the output head cannot give probability 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod, require
from paceline.control.logits import entropy, keep_only, softmax
from paceline.core import Control, Exactness, Floats, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls

_LIKELY = 256  # tokens that the search uses; a proof is then checked on the whole vocabulary
_STEPS = 24  # iterations of the search
_MARGIN = 1e-6  # relative slack, so that rounding cannot make a proof

Doubles = NDArray[np.float64]


@controls.register("basis_aware", Exactness.EXACT)
@dataclass(frozen=True)
class BasisAware(ControlMethod):
    """Eta sampling that also keeps tokens below its cutoff that provably have true probability.

    A model's hidden state is far smaller than its vocabulary, so training can only match the true
    distribution in the directions of the output head. A token is kept if no distribution without
    it agrees with the model's in these directions, within the error that the cutoff allows. That is
    a linear programme: by Farkas' lemma, a direction in which the two sides differ proves that it
    has no solution. Such a direction is searched for by affine scaling (Dikin, 1967). A token
    without a proof is dropped; so every token that is kept is proven, but a proof may be missed.

    Use it at temperature 1, as the theory is about the model's own probabilities. On small models
    nearly all tested tokens are proven, so that `tests` decides how many are kept. A token costs 3
    ms with a vocabulary of 512, 25 ms with one of 14,019.

    Attributes:
        epsilon: in (0, 1), as in `eta`. Default 0.02, larger than that of `eta`, since tokens below
            the cutoff may be kept.
        rank: number of directions of the head, strongest first. Default 20, the paper's.
        tests: number of tokens below the cutoff that are tested, most likely first; the rest are
            dropped. The paper tests each drawn token instead. Default 8.
    """

    epsilon: float = 0.02
    rank: int = 20
    tests: int = 8

    order = 59
    examples = ("basis_aware", "basis_aware:epsilon=0.05,tests=4")
    source = Source(
        authors="Finlayson et al.",
        title="Closing the Curious Case of Neural Text Degeneration",
        arxiv="2310.01693",
        section="4",
    )
    catalogue = (212,)

    def __post_init__(self) -> None:
        require(0 < self.epsilon < 1, "basis_aware:epsilon", self.epsilon, "above 0, below 1")
        require(1 <= self.rank <= 64, "basis_aware:rank", self.rank, "1 to 64")
        require(1 <= self.tests <= 64, "basis_aware:tests", self.tests, "1 to 64")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Compute the directions of the model's output head, once per model.

        Raises:
            MethodError: the engine runs several models, or the head is followed by a softcap.
        """
        known = _known.setdefault(vocabulary, {})
        if self.rank not in known:
            known[self.rank] = directions(vocabulary.head, self.rank)
        return _BasisAware(self, known[self.rank])


class _BasisAware:
    def __init__(self, method: BasisAware, directions: Doubles) -> None:
        self._method, self._directions = method, directions

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Keep the tokens above the cutoff, and those below it that are proven."""
        p = softmax(logits)
        epsilon = self._method.epsilon
        cutoff = min(epsilon, epsilon**0.5 * np.exp(-entropy(p)))
        kept = (p >= cutoff) | (logits == logits.max())
        below = np.flatnonzero(~kept & (p > 0))
        if len(below):
            tests = below[np.argsort(-p[below], kind="stable")[: self._method.tests]]
            kept[tests] = proven(p, self._directions, tests, cutoff)
        return keep_only(logits, kept)


_known: WeakKeyDictionary[Vocabulary, dict[int, Doubles]] = WeakKeyDictionary()


def directions(head: Floats, rank: int) -> Doubles:
    """Return the leading left singular vectors [V, R] of a head [V, D]; R = min(`rank`, D)."""
    weights = head.astype(np.float64)
    _, vectors = np.linalg.eigh(weights.T @ weights)
    scaled = weights @ vectors[:, ::-1][:, :rank]
    return np.asarray(scaled / np.maximum(np.linalg.norm(scaled, axis=0), 1e-300))


def proven(
    p: Doubles, directions: Doubles, tokens: NDArray[Any], cutoff: float
) -> NDArray[np.bool_]:
    """Return which `tokens` [T] must have probability in any distribution that agrees with `p` [V].

    It must agree in `directions` [V, R]. With d the rows of the directions minus that of the tested
    token, any m [R] is a proof if h = 1 + d @ m is so small that the sum over the other tokens of
    p * (k * max(h, 0) + max(-h, 0)) is below the token's own p. The allowed error is
    k = cutoff / (1 - cutoff).
    """
    k = cutoff / (1.0 - cutoff)
    likely = np.argpartition(p, -min(_LIKELY, len(p)))[-_LIKELY:]
    weights = p[likely] * (likely != tokens[:, None])  # [T, L]
    d = directions[likely] - directions[tokens][:, None]  # [T, L, R]
    ridge = 1e-12 * np.eye(directions.shape[1])
    enough = p[tokens] * (1.0 - _MARGIN)
    proven_tokens = np.zeros(len(tokens), bool)
    y = np.zeros_like(weights)  # of the dual problem: d.T @ y = 0, -weights <= y <= k * weights
    for _ in range(_STEPS):
        room = np.minimum(weights + y, k * weights - y) ** 2
        matrix = d.transpose(0, 2, 1) @ (d * room[..., None])
        matrix += (np.trace(matrix, axis1=1, axis2=2)[:, None, None] + 1e-300) * ridge
        m = -np.linalg.solve(matrix, (room[:, None] @ d).transpose(0, 2, 1))[..., 0]
        h = 1.0 + np.einsum("tlr,tr->tl", d, m)
        near = np.flatnonzero(~proven_tokens & ((weights * _bent(h, k)).sum(1) < enough))
        if len(near):
            proven_tokens[near] = _loss(p, directions, tokens[near], m[near], k) < enough[near]
        if (
            proven_tokens | (y.sum(1) >= p[tokens])
        ).all():  # weak duality: no m is below what y reaches
            break
        step = room * h
        bound = np.where(step > 0, k * weights - y, weights + y)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = np.where(step == 0, np.inf, bound / np.abs(step)).min(1)
        y += 0.95 * np.where(np.isfinite(reach), reach, 0.0)[:, None] * step
    return proven_tokens


def _bent(h: Doubles, k: float) -> Doubles:
    return np.where(h > 0, k * h, -h)


def _loss(p: Doubles, directions: Doubles, tokens: NDArray[Any], m: Doubles, k: float) -> Doubles:
    """Return the sum in `proven` for `m` [T, R] over the whole vocabulary, [T]."""
    own = np.einsum("tr,tr->t", directions[tokens], m)
    loss = p * _bent(1.0 + m @ directions.T - own[:, None], k)
    loss[np.arange(len(tokens)), tokens] = 0.0
    return np.asarray(loss.sum(1))

"""Calibrated probabilities of the target's next draw from a draft model's logits."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, Request, State, Tokens
from paceline.drafters.state import checked
from paceline.errors import MethodError
from paceline.noise import noise_of, perturbation

_LIMIT = 8.0  # the sharpness is between 1 / 8 and 8
_START = (2.0, 1.4)  # sharpness, greedy and sampled, to which small pairs of models converge
_RANKS = 8  # siblings with a probability of their own


class Calibration:
    """Probabilities of successors under the request's temperature and the noise of its walk.

    Two models agree more often on which token wins than either is sure of it. So a probability is
    the softmax of the draft's perturbed logits times a sharpness, which follows the gradient of the
    log probability of every token that was drawn. There is one sharpness for greedy requests and
    one for sampled ones.

    Args:
        rate: learning rate of the sharpness.
        vocab_size: tokens of the target; draft logits beyond it are ignored.
        shared: draft and target share a vocabulary, so that the known noise of the walk tells
            which of the likely tokens it will draw.
    """

    def __init__(self, rate: float, vocab_size: int, shared: bool = True) -> None:
        self._rate, self._vocab_size, self._shared = rate, vocab_size, shared
        self._sharpness: NDArray[np.float64] = np.array(_START)
        self._tested: NDArray[np.float64] = np.empty(_RANKS)
        self._accepted: NDArray[np.float64] = np.empty(_RANKS)
        self._noise: dict[int, Floats] = {}
        self._ids = np.empty(0, np.int32)  # tokens that `_noise` is for
        self._temperature, self._request = 0.0, Request((), 0)
        self.reset()

    def fork(self) -> Calibration:
        """Return the calibration of a concurrent request; what either learns is shared."""
        other = copy(self)
        other._noise = {}
        return other

    def begin(self, request: Request) -> None:
        """Start a request with its temperature and its noise."""
        self._temperature, self._request = request.temperature, request
        self._noise.clear()

    def judge(
        self, logits: Floats, positions: Tokens, k: int, ids: Tokens | None = None
    ) -> tuple[Tokens, Floats]:
        """Return the `k` most likely draws [n, k], best first, and their probabilities [n, k].

        Args:
            logits: [n, V] of the draft.
            positions: int32 [n], index in the whole sequence of the token that each row predicts.
            k: how many; at most the smaller vocabulary.
            ids: increasing, the tokens that the columns belong to if they are not the first V;
                others have probability 0.
        """
        scores = self._cut(logits, ids)
        if self._temperature > 0:
            scores = scores / np.float32(self._temperature)
            if self._shared:
                known = np.arange(scores.shape[1], dtype=np.int32) if ids is None else ids
                scores += np.stack([self._at(p, known) for p in positions.tolist()])
        sharper = scores * np.float32(self._sharpness[self._kind])
        tokens, probs = _native.top_k(sharper, min(k, scores.shape[1]))
        return tokens if ids is None else ids[tokens], probs

    def learn(self, token: int, tokens: Tokens, probs: Floats) -> None:
        """Record that `token` was drawn where `judge` had returned `tokens` and `probs` [k]."""
        known = probs > 0
        logs = np.log(probs[known])
        places = np.flatnonzero(tokens[known] == token)
        mean = float(probs[known] @ logs / probs[known].sum())
        slope = (float(logs[places[0]]) if len(places) else float(logs.min())) - mean
        sharper = self._sharpness[self._kind] * np.exp(self._rate * np.clip(slope, -1.0, 1.0))
        self._sharpness[self._kind] = np.clip(sharper, 1.0 / _LIMIT, _LIMIT)

    def draw(
        self,
        logits: Floats,
        counts: list[int],
        random: np.random.Generator,
        ids: Tokens | None = None,
    ) -> tuple[Floats, list[Tokens]]:
        """Return the draft's distributions [n, V of the target] and draws without replacement.

        Args:
            logits: [n, V] of the draft.
            counts: draws wanted of each row.
            random: source of the draws.
            ids: as for `judge`.
        """
        scores = self._cut(logits, ids).astype(np.float64) / self._temperature
        powers = np.exp(scores - scores.max(1, keepdims=True))
        rows = np.zeros((len(scores), self._vocab_size), np.float32)
        rows[:, slice(scores.shape[1]) if ids is None else ids] = powers / powers.sum(
            1, keepdims=True
        )
        drawn = []
        for row, count in zip(rows, counts, strict=True):
            possible = np.flatnonzero(row)
            keys = np.log(row[possible]) + random.gumbel(size=len(possible))
            drawn.append(possible[np.argsort(-keys)[:count]].astype(np.int32))
        return rows, drawn

    def ranks(self) -> list[float]:
        """Return the probability that each drawn sibling is accepted if those before are not."""
        return list((self._accepted / self._tested).tolist())

    def rank(self, tested: int, accepted: bool) -> None:
        """Record that `tested` siblings were tried, and whether the last of them was accepted."""
        self._tested[:tested] += 1.0
        if accepted and 0 < tested <= _RANKS:
            self._accepted[tested - 1] += 1.0

    def state(self) -> State:
        """Return the sharpness, and how often each sibling was tested and accepted."""
        return {
            "sharpness": self._sharpness.copy(),
            "ranks": np.stack([self._tested, self._accepted]),
        }

    def load(self, state: State) -> None:
        """Restore what `state` returned; other names are ignored.

        Raises:
            MethodError: it is not such a state.
        """
        own: State = {name: state[name] for name in ("sharpness", "ranks") if name in state}
        tiny = float(np.finfo(np.float64).tiny)
        ranges = {"sharpness": (1.0 / _LIMIT, _LIMIT), "ranks": (tiny, np.inf)}
        checked("a draft model", own, self.state(), ranges)
        tested, accepted = own["ranks"].copy()
        if (accepted > tested).any():
            raise MethodError("this state of a draft model holds impossible ranks; reset it")
        self._sharpness, self._tested, self._accepted = own["sharpness"].copy(), tested, accepted

    def reset(self) -> None:
        """Forget what was learnt."""
        self._sharpness = np.array(_START)
        self._tested = np.full(_RANKS, 4.0)
        self._accepted = self._tested * 0.7 * 0.5 ** np.arange(_RANKS, dtype=np.float64)
        self._noise.clear()

    @property
    def _kind(self) -> int:
        return int(self._temperature > 0)

    def _cut(self, logits: Floats, ids: Tokens | None) -> Floats:
        return logits[:, : self._vocab_size] if ids is None else logits

    def _at(self, position: int, ids: Tokens) -> Floats:
        """Return the noise of a position [V]; kept, as proposals look some positions ahead."""
        if not np.array_equal(ids, self._ids):
            self._ids = ids
            self._noise.clear()
        if position not in self._noise:
            for old in [p for p in self._noise if p < position - 64]:
                del self._noise[old]
            start = noise_of(self._request, position)
            noise = np.zeros(len(ids)) if start is None else perturbation(start, ids)
            self._noise[position] = noise.astype(np.float32)
        return self._noise[position]

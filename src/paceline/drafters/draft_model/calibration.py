"""What a draft model's logits say about the target's next draw."""

from __future__ import annotations

from copy import copy

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, Request, State, Tokens
from paceline.errors import MethodError
from paceline.noise import noise_of, perturbation

_LIMIT = 8.0  # of the sharpness, both ways
_START = (2.0, 1.4)  # sharpness greedy and sampled, where small pairs of models end up
_RANKS = 8  # siblings told apart


class Calibration:
    """Calibration of successors under the request's temperature and the noise of its walk.

    Two models agree more often on which token wins than either is sure of it: a chance is the
    softmax of the draft's perturbed logits times a sharpness, which follows the gradient of the
    log chance of every token that came. One for greedy and one for sampled requests.

    Args:
        rate: of learning the sharpness.
        vocab_size: tokens of the target; draft logits beyond it are ignored.
        shared: draft and target have the same tokens, so that the noise of the walk says which of
            them it will draw.
    """

    def __init__(self, rate: float, vocab_size: int, shared: bool = True) -> None:
        self._rate, self._vocab_size, self._shared = rate, vocab_size, shared
        self._sharpness: NDArray[np.float64] = np.array(_START)
        self._tested: NDArray[np.float64] = np.empty(_RANKS)
        self._accepted: NDArray[np.float64] = np.empty(_RANKS)
        self._noise: dict[int, Floats] = {}
        self._ids = np.empty(0, np.int32)  # tokens that it is for
        self._heat, self._request = 0.0, Request((), 0)
        self.reset()

    def fork(self) -> Calibration:
        """Those of another request at the same time; what either learns both know."""
        other = copy(self)
        other._noise = {}
        return other

    def begin(self, request: Request) -> None:
        """A new request: its temperature and its noise."""
        self._heat, self._request = request.temperature, request
        self._noise.clear()

    def judge(
        self, logits: Floats, positions: Tokens, k: int, ids: Tokens | None = None
    ) -> tuple[Tokens, Floats]:
        """The `k` likeliest draws [n, k], best first, at `positions` [n], and their chances.

        Args:
            logits: [n, V] of the draft.
            positions: index in the whole sequence of the token that each row foretells.
            k: how many; at most the smaller vocabulary.
            ids: increasing, the tokens that the logits belong to if they are not the first V;
                others have no chance.
        """
        scores = self._cut(logits, ids)
        if self._heat > 0:
            scores = scores / np.float32(self._heat)
            if self._shared:
                known = np.arange(scores.shape[1], dtype=np.int32) if ids is None else ids
                scores += np.stack([self._at(p, known) for p in positions.tolist()])
        sharper = scores * np.float32(self._sharpness[self._kind])
        tokens, chances = _native.top_k(sharper, min(k, scores.shape[1]))
        return tokens if ids is None else ids[tokens], chances

    def learn(self, token: int, tokens: Tokens, chances: Floats) -> None:
        """`token` came where `judge` had given these successors [k] these chances."""
        known = chances > 0
        logs = np.log(chances[known])
        found = np.flatnonzero(tokens[known] == token)
        mean = float(chances[known] @ logs / chances[known].sum())
        slope = (float(logs[found[0]]) if len(found) else float(logs.min())) - mean
        sharper = self._sharpness[self._kind] * np.exp(self._rate * np.clip(slope, -1.0, 1.0))
        self._sharpness[self._kind] = np.clip(sharper, 1.0 / _LIMIT, _LIMIT)

    def draw(
        self,
        logits: Floats,
        counts: list[int],
        random: np.random.Generator,
        ids: Tokens | None = None,
    ) -> tuple[Floats, list[Tokens]]:
        """The draft's distributions [n, V of the target], and draws without replacement.

        `ids` as for `judge`.
        """
        scores = self._cut(logits, ids).astype(np.float64) / self._heat
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
        """Chance that the first, second, ... of drawn siblings is accepted after the others."""
        return list((self._accepted / self._tested).tolist())

    def rank(self, tested: int, accepted: bool) -> None:
        """So many siblings were tried; the last of them was accepted, or none was."""
        self._tested[:tested] += 1.0
        if accepted and 0 < tested <= _RANKS:
            self._accepted[tested - 1] += 1.0

    def state(self) -> State:
        """Sharpness, and how often each sibling was tested and accepted."""
        return {
            "sharpness": self._sharpness.copy(),
            "ranks": np.stack([self._tested, self._accepted]),
        }

    def load(self, state: State) -> None:
        """Take over what `state` gave.

        Raises:
            MethodError: it is not such a state.
        """
        sharpness, ranks = state["sharpness"], state["ranks"]
        right = sharpness.shape == (2,) and ranks.shape == (2, _RANKS)
        right = right and sharpness.dtype == ranks.dtype == np.float64
        if not (
            right
            and ((sharpness >= 1.0 / _LIMIT) & (sharpness <= _LIMIT)).all()
            and (np.isfinite(ranks) & (ranks > 0)).all()
            and (ranks[1] <= ranks[0]).all()
        ):
            raise MethodError("this state holds impossible chances of a draft model; reset it")
        self._sharpness = sharpness.copy()
        self._tested, self._accepted = ranks.copy()

    def reset(self) -> None:
        """Forget what was learnt."""
        self._sharpness = np.array(_START)
        self._tested = np.full(_RANKS, 4.0)
        self._accepted = self._tested * 0.7 * 0.5 ** np.arange(_RANKS, dtype=np.float64)
        self._noise.clear()

    @property
    def _kind(self) -> int:
        return int(self._heat > 0)

    def _cut(self, logits: Floats, ids: Tokens | None) -> Floats:
        return logits[:, : self._vocab_size] if ids is None else logits

    def _at(self, position: int, ids: Tokens) -> Floats:
        """The noise of a position [V]; kept, since every proposal looks some positions ahead."""
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

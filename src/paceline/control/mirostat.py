"""Mirostat 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod, require
from paceline.control.logits import keep_only, softmax, surprise
from paceline.core import Control, Exactness, Floats, Request
from paceline.errors import RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("mirostat", Exactness.EXACT)
@dataclass(frozen=True)
class Mirostat(ControlMethod):
    """Keep the surprise of drawn tokens near a target by moving a threshold.

    Tokens with more surprise (-log2 p) than the threshold mu are dropped. After each token, mu
    moves by `eta` times the distance of its surprise from the target. mu starts at twice the
    target.

    Attributes:
        tau: target surprise in bits, 0 to 64. Default 5, that of the author's and llama.cpp's
            version 2.
        eta: learning rate, 0 to 1. Default 0.1, the paper's.
    """

    tau: float = 5.0
    eta: float = 0.1

    order = 69
    examples = ("mirostat", "mirostat:tau=1.5,eta=0.5")
    source = Source(
        authors="Basu et al.",
        title="Mirostat",
        arxiv="2007.14966",
        section="section 5",
        note="version 2, which thresholds the surprise itself",
    )

    def __post_init__(self) -> None:
        require(0 < self.tau <= 64, "mirostat", self.tau, "above 0 and at most 64")
        require(0 <= self.eta <= 1, "mirostat:eta", self.eta, "0 to 1")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control with mu at its start."""
        return _Mirostat(self, len(request.prompt))


class _Mirostat:
    """Keeps mu by position, as a token's surprise is known only from the logits it was drawn from.

    A walk draws once at each position, in order, whatever the drafter. A repeated call at one
    position uses the same mu.
    """

    single_sequence = True

    def __init__(self, method: Mirostat, start: int) -> None:
        self._method, self._start = method, start
        self._mu: list[float] = []  # before each new token
        self._bits: NDArray[np.float64] = np.zeros(0)  # surprises at the last position

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        position = len(history) - self._start
        if position == 0:
            self._mu = [2 * self._method.tau]
        elif position == len(self._mu):
            error = float(self._bits[history[-1]]) - self._method.tau
            self._mu.append(self._mu[-1] - self._method.eta * error)
        elif position != len(self._mu) - 1:
            raise RequestError("mirostat was called out of order; use one request at a time")
        bits: NDArray[np.float64] = surprise(softmax(logits)) / np.log(2)
        self._bits = bits
        return keep_only(logits, (bits <= self._mu[position]) | (logits == logits.max()))

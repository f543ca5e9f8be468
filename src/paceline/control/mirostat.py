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
    """Steer the surprise of the drawn tokens to a target by moving a cut on it.

    Tokens more surprising than mu are dropped; after each token mu moves by the distance of its
    surprise from the target. It starts at twice the target.

    Attributes:
        tau: target surprise in bits, 0 to 64. Default 5, that of the author's and llama.cpp's
            version 2.
        eta: learning rate, 0 to 1. Default 0.1, the paper's.
    """

    tau: float = 5.0
    eta: float = 0.1

    order = 69
    source = Source(
        authors="Basu et al.",
        title="Mirostat",
        arxiv="2007.14966",
        section="section 5",
        note="version 2 cuts by surprise itself",
    )

    def __post_init__(self) -> None:
        require(0 < self.tau <= 64, "mirostat", self.tau, "above 0 and at most 64")
        require(0 <= self.eta <= 1, "mirostat:eta", self.eta, "0 to 1")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """With mu at its start."""
        return _Mirostat(self, len(request.prompt))


class _Mirostat:
    """The surprise of a drawn token is known only from the logits it was drawn from.

    So mu is kept by position: a walk draws once at each, in order, whoever drafted. Asked again at
    a position, it answers from the same mu.
    """

    single_sequence = True

    def __init__(self, method: Mirostat, start: int) -> None:
        self._method, self._start = method, start
        self._mu: list[float] = []  # before each new token
        self._bits: NDArray[np.float64] = np.zeros(0)  # surprises at the last position

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        place = len(history) - self._start
        if place == 0:
            self._mu = [2 * self._method.tau]
        elif place == len(self._mu):
            error = float(self._bits[history[-1]]) - self._method.tau
            self._mu.append(self._mu[-1] - self._method.eta * error)
        elif place != len(self._mu) - 1:
            raise RequestError("mirostat was asked out of order; use one request at a time")
        bits: NDArray[np.float64] = surprise(softmax(logits)) / np.log(2)
        self._bits = bits
        return keep_only(logits, (bits <= self._mu[place]) | (logits == logits.max()))

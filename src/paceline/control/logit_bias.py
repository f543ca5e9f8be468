"""Logit bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.control.base import ControlMethod, require
from paceline.core import Control, Exactness, Floats, Request
from paceline.errors import MethodError
from paceline.method_spec import members
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("logit_bias", Exactness.EXACT)
@dataclass(frozen=True)
class LogitBias(ControlMethod):
    """Add constants to the logits of given tokens.

    Attributes:
        biases: `ID=NUMBER` items separated by `;`, each -100 to 100, as in `13=-5;42=2.5`.
    """

    biases: str

    order = 10
    examples = ("logit_bias:biases=410=4;415=-100",)
    source = Source(title="OpenAI API reference, logit_bias")

    def __post_init__(self) -> None:
        self.pairs()

    def pairs(self) -> dict[int, float]:
        """Return the bias of each token.

        Raises:
            MethodError: `biases` is not such a list, or names a token twice.
            RequestError: a bias is out of range.
        """
        biases: dict[int, float] = {}
        for item in members("logit_bias", self.biases, ";"):
            token, _, bias = map(str.strip, item.partition("="))
            try:
                if not (token.isascii() and token.isdecimal() and len(token) < 10):
                    raise ValueError
                value = float(bias)
            except ValueError:
                raise MethodError(f"logit_bias has {item!r}, expected ID=NUMBER") from None
            require(-100 <= value <= 100, "logit_bias", value, "-100 to 100")
            if int(token) in biases:
                raise MethodError(f"logit_bias names token {token} twice; give one bias")
            biases[int(token)] = value
        return biases

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control; tokens must be in the vocabulary."""
        pairs = self.pairs()
        tokens = vocabulary.known("logit_bias", pairs)
        return _LogitBias(tokens, np.array([pairs[int(t)] for t in tokens], np.float32))


@dataclass(frozen=True)
class _LogitBias:
    tokens: NDArray[np.int64]
    biases: Floats

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        edited = logits.copy()
        edited[self.tokens] += self.biases
        return edited

"""Rotary position embedding: the angles of every position, with the scalings in use."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.core import Floats


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of the first `dim` values of a head (RoFormer, arXiv 2104.09864, section 3.2).

    Attributes:
        theta: base of the frequencies.
        dim: rotated values of each head, even.
        scaling: `default`, `linear`, `dynamic`, `llama3` or `yarn`.
        parameters: the scaling's settings, as sorted pairs.
    """

    theta: float
    dim: int
    scaling: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()

    def table(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Cosines and sines for positions `start` to `stop`, float32 [stop - start, dim / 2].

        A row depends on its position alone, whatever the length of the sequence.
        """
        raise NotImplementedError

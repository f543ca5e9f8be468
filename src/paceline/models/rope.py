"""Rotary position embeddings: angles of every position, with the scalings in use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paceline.core import Floats

DUAL_CHUNK = "dual_chunk"  # no checkpoint has it; see `models.dual_chunk`

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

# Rows are computed in multiples of this, so that no value falls into the scalar tail of a
# vectorised loop: there numpy may round otherwise, and a row would depend on its neighbours.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Rope:
    """Angles of the first `dim` values of a head (RoFormer, arXiv 2104.09864, section 3.2).

    Attributes:
        theta: base of the frequencies.
        dim: rotated values of each head, even.
        scaling: `default`, `linear`, `dynamic` (NTK), `llama3`, `yarn` (arXiv 2309.00071),
            `longrope` (arXiv 2402.13753, within the original context only), or `dual_chunk`, of
            which `table` is that of keys: positions begin anew in every chunk.
        parameters: the scaling's settings, as sorted pairs.
        divisors: one for each frequency, [dim / 2], for `longrope`.
        adjacent: values 2i and 2i + 1 of a head turn together (Cohere, GLM, ERNIE); otherwise
            values i and i + dim / 2.
        query_growth, query_length: queries at position p are multiplied by
            1 + query_growth * log(1 + floor(p / query_length)) (Ministral 3, Llama 4).
    """

    theta: float
    dim: int
    scaling: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()
    divisors: tuple[float, ...] = ()
    adjacent: bool = False
    query_growth: float = 0.0
    query_length: int = 1

    def table(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Return cosines and sines of positions `start` to `stop`, float32 [stop - start, dim / 2].

        A row depends on its position alone, whatever the length of the sequence. `dynamic` gives
        position p the base for a sequence of p + 1 tokens: what decoding token by token over a
        cache sees, where a whole prompt beyond the original context would get one base.
        """
        rows = max(stop - start, 0)
        padded = -(-rows // _BLOCK) * _BLOCK
        positions = np.arange(start, start + padded, dtype=np.float32)[:, None]
        if self.scaling == DUAL_CHUNK:
            positions = positions % np.float32(dict(self.parameters)["chunk"])
        angles = positions * self._frequencies(positions)
        scale = np.float32(self.amplitude)
        return (np.cos(angles) * scale)[:rows], (np.sin(angles) * scale)[:rows]

    def query_scales(self, start: int, stop: int) -> Floats:
        """Return the factor of queries at positions `start` to `stop`, float32 [stop - start]."""
        periods = (np.arange(start, stop) // self.query_length).astype(np.float32)
        logs: Floats = np.log(np.float32(1) + periods)
        return np.float32(1) + np.float32(self.query_growth) * logs

    def _frequencies(self, positions: Floats) -> Floats:
        """Return radians per position, [1, dim / 2]; [S, dim / 2] for `dynamic`."""
        settings = dict(self.parameters)
        steps = np.arange(0, self.dim, 2).astype(np.float32) / np.float32(self.dim)
        if self.scaling == "dynamic":
            original, factor = settings["original_max_position_embeddings"], settings["factor"]
            length = np.maximum(positions.astype(np.float64) + 1, original)
            growth = factor * length / original - (factor - 1)
            base = self.theta * growth ** (self.dim / (self.dim - 2))
            return _inverse(base.astype(np.float32) ** steps)
        powers = np.power(np.float32(self.theta), steps)
        if self.scaling == "longrope":
            return _inverse(np.array(self.divisors, np.float32) * powers)[None]
        plain = _inverse(powers)
        if self.scaling == "linear":
            plain = plain / np.float32(settings["factor"])
        elif self.scaling == "llama3":
            plain = _llama3(plain, settings)
        elif self.scaling == "yarn":
            plain = self._yarn(plain, settings)
        return plain[None]

    def _yarn(self, plain: Floats, settings: dict[str, float]) -> Floats:
        """Interpolate slow frequencies, keep fast ones, with a ramp in between."""
        original = settings["original_max_position_embeddings"]

        def turning(rotations: float) -> float:
            """Return the dimension that makes `rotations` turns in the original context."""
            waves = original / (rotations * 2 * math.pi)
            return self.dim * math.log(waves) / (2 * math.log(self.theta))

        low, high = turning(settings["beta_fast"]), turning(settings["beta_slow"])
        if settings["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low if high != low else 0.001
        ramp = (np.arange(self.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
        slow: Floats = np.clip(ramp, 0, 1)
        return plain / np.float32(settings["factor"]) * slow + plain * (1 - slow)

    @property
    def frequencies(self) -> Floats:
        """Radians per position, [dim / 2]; of `dynamic` those within the original context."""
        values: Floats = self._frequencies(np.zeros((1, 1), np.float32))[0]
        return values

    def moved(self, keys: Floats, by: int) -> Floats:
        """Return rotated keys [..., D] as they would be `by` positions further on.

        Rotations add up, so that this is exact but for rounding while the frequencies are the same
        everywhere: of `dynamic`, within the original context.
        """
        half = self.dim // 2
        angles = self.frequencies.astype(np.float64) * by
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        pairs = keys[..., : self.dim]
        if self.adjacent:
            one, other = pairs[..., 0::2], pairs[..., 1::2]
        else:
            one, other = pairs[..., :half], pairs[..., half:]
        result = keys.copy()
        turned = result[..., : self.dim]
        first, second = one * cosines - other * sines, other * cosines + one * sines
        if self.adjacent:
            turned[..., 0::2], turned[..., 1::2] = first, second
        else:
            turned[..., :half], turned[..., half:] = first, second
        return result

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        settings = dict(self.parameters)
        if "attention_factor" in settings:
            return settings["attention_factor"]
        if self.scaling == "longrope":
            stretch = math.log(max(settings["factor"], 1.0))
            return math.sqrt(1 + stretch / math.log(settings["original_max_position_embeddings"]))
        if self.scaling != "yarn":
            return 1.0

        def entropy(weight: float) -> float:
            return 0.1 * weight * math.log(max(settings["factor"], 1.0)) + 1

        if settings.get("mscale") and settings.get("mscale_all_dim"):
            return entropy(settings["mscale"]) / entropy(settings["mscale_all_dim"])
        return entropy(1)


def _inverse(values: Floats) -> Floats:
    return np.float32(1) / values


def _llama3(plain: Floats, settings: dict[str, float]) -> Floats:
    """Stretch long wavelengths by `factor`, keep short ones, and blend those in between."""
    original, factor = settings["original_max_position_embeddings"], settings["factor"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    waves = np.float32(original) / (np.float32(2 * math.pi) / plain)  # in the original context
    kept: Floats = np.clip((waves - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - kept) * plain / np.float32(factor) + kept * plain

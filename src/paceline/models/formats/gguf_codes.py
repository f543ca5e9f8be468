"""Other codes for the scales of quantised blocks: what rounding with error feedback needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.models.formats.gguf_k_quantize import (
    IQ4_LEVELS,
    pack_bit,
    pack_halves,
    pack_pairs,
    pack_six_bits,
    pack_two_bits,
)
from paceline.models.formats.gguf_quantize import join_nibbles, pack_fifth_bits
from paceline.models.formats.gguf_types import TYPES, dequantize

Bytes = NDArray[np.uint8]
Packer = Callable[[Bytes], Bytes]

# Type -> largest code, and the bytes of a block that hold codes: where they begin, how they are
# packed. Codes of Q8_0 are 128 more than its numbers; -128 is left out, as llama.cpp does.
_LAYOUTS: dict[str, tuple[int, tuple[tuple[int, Packer], ...]]] = {
    "Q4_0": (15, ((2, join_nibbles),)),
    "Q4_1": (15, ((4, join_nibbles),)),
    "Q5_0": (31, ((2, pack_fifth_bits), (6, join_nibbles))),
    "Q5_1": (31, ((4, pack_fifth_bits), (8, join_nibbles))),
    "Q8_0": (255, ((2, lambda codes: codes ^ np.uint8(128)),)),
    "Q2_K": (3, ((16, pack_two_bits),)),
    "Q3_K": (
        7,
        ((0, lambda codes: pack_bit(codes, 2)), (32, lambda c: pack_two_bits(c & np.uint8(3)))),
    ),
    "Q4_K": (15, ((16, pack_pairs),)),
    "Q5_K": (31, ((16, lambda codes: pack_bit(codes, 4)), (48, pack_pairs))),
    "Q6_K": (63, ((0, pack_six_bits),)),
    "IQ4_NL": (15, ((2, join_nibbles),)),
    "IQ4_XS": (15, ((8, pack_halves),)),
}
_SMALLEST = {"Q8_0": 1}
_MIDDLES = (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / 2


def with_codes(name: str, blocks: Bytes, codes: Bytes) -> Bytes:
    """Return blocks [n, bytes] with the same scales and other codes, [n, weights]."""
    changed = blocks.copy()
    for start, pack in _LAYOUTS[name][1]:
        packed = pack(codes)
        changed[:, start : start + packed.shape[1]] = packed
    return changed


@dataclass(frozen=True)
class BlockGrid:
    """The values that the weights of some blocks can take.

    Attributes:
        name: of the type.
        zeros: value of code 0, [n, weights].
        steps: from one code to the next, or of one unit of the uneven levels, [n, weights].
    """

    name: str
    zeros: Floats
    steps: Floats

    @classmethod
    def of(cls, name: str, blocks: Bytes) -> BlockGrid:
        """Read the grid from the scales of blocks [n, bytes]."""
        shape = (len(blocks), TYPES[name].weights)
        top = _LAYOUTS[name][0]
        zeros, ends = (
            dequantize(name, with_codes(name, blocks, np.full(shape, code, np.uint8)))
            for code in (0, top)
        )
        units = IQ4_LEVELS[-1] - IQ4_LEVELS[0] if name.startswith("IQ4") else np.float32(top)
        return cls(name, zeros, ((ends - zeros) / units).astype(np.float32))

    def round(self, column: int, values: Floats) -> tuple[Bytes, Floats]:
        """Return the codes nearest to one weight of each block, [n], and what they stand for."""
        step, zero = self.steps[:, column], self.zeros[:, column]
        units = np.divide(values - zero, step, out=np.zeros_like(values), where=step != 0)
        if self.name.startswith("IQ4"):
            places = np.searchsorted(_MIDDLES, units + IQ4_LEVELS[0])
            return places.astype(np.uint8), zero + (IQ4_LEVELS[places] - IQ4_LEVELS[0]) * step
        codes = np.clip(np.rint(units), _SMALLEST.get(self.name, 0), _LAYOUTS[self.name][0])
        return codes.astype(np.uint8), zero + codes * step

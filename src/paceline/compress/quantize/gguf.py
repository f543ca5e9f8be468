"""The block types of GGUF files, with scales that minimise the error weighted by the inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.column_errors import inverse_factor, keep_last
from paceline.core import Exactness
from paceline.errors import MethodError, ModelError, unknown
from paceline.models.export.gguf_mixes import MIXES, Position
from paceline.models.export.gguf_types import fit_type
from paceline.registry import Source, check_range, quantizers

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.core import Floats
    from paceline.models.config import ModelConfig
    from paceline.models.tensors import Linear

# Type -> bits, inputs that share a scale, and whether its grid is centred on zero.
_GRIDS = {
    **{"Q4_0": (4, 32, True), "Q4_1": (4, 32, False), "Q5_0": (5, 32, True)},
    **{"Q5_1": (5, 32, False), "Q8_0": (8, 32, True), "Q2_K": (2, 16, False)},
    **{"Q3_K": (3, 16, True), "Q4_K": (4, 32, False), "Q5_K": (5, 32, False)},
    **{"Q6_K": (6, 16, True), "IQ4_NL": (4, 32, True), "IQ4_XS": (4, 32, True)},
}
# Types with a code for zero, whose fallbacks have one, too.
_WITH_ZERO = ("q4_0", "q5_0", "q8_0", "q3_k", "q6_k")
_NAMES = tuple(name.lower() for name in (*_GRIDS, *MIXES))


@quantizers.register("gguf", Exactness.LOSSY)
@dataclass(frozen=True)
class GGUFBlocks(WeightCompressor):
    """Round to a block type of GGUF, which llama.cpp runs as it is.

    Scales and minima minimise the squared error weighted by the mean squares of the inputs (the
    importance matrix of llama.cpp). A matrix whose rows are no whole blocks of the type takes the
    type that llama.cpp falls back to; the card tells how many.

    Attributes:
        type: q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl or iq4_xs; or a
            mix with more bits for some matrices: q2_k_m, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m,
            q5_k_s or q5_k_m. Default q4_k.
        imatrix: weight errors by the inputs; otherwise large weights count more. Default true.
        feedback: round input by input and move the error of each into those after it, as GPTQ
            does, with the scales of the type. Default false.
        damping: share of the mean diagonal of the second moment that is added to it for the
            feedback, 0 to 1. Default 0.01.
    """

    type: str = "q4_k"
    imatrix: bool = True
    feedback: bool = False
    damping: float = 0.01

    source = Source(
        title="llama.cpp, ggml-common.h and llama-quant.cpp",
        note="layouts, mixes and fallbacks are llama.cpp's, the searches for scales are our own",
    )
    examples = ("gguf:feedback=true", "gguf:type=q4_0", "gguf:type=q4_k_m,imatrix=false")

    def __post_init__(self) -> None:
        if self.type not in _NAMES:
            raise MethodError(unknown(f"type of {self.name}", self.type, _NAMES))
        check_range(0.0, 1.0, self.name, damping=self.damping)
        if self.feedback and not self.imatrix:
            raise MethodError(
                f"{self.name}:feedback=true needs the inputs, which imatrix=false leaves out; "
                "leave one of them out"
            )

    @property
    def optional_statistics(self) -> frozenset[Statistic]:
        """See `Compressor`."""
        if self.feedback:
            return frozenset({Statistic.SECOND_MOMENT})
        return frozenset({Statistic.INPUT_NORM}) if self.imatrix else frozenset()

    @property
    def keeps_zeros(self) -> bool:
        """See `WeightCompressor`: feedback fills zeros, and few types have a code for them."""
        return self.type in _WITH_ZERO and not self.feedback

    @property
    def quick(self) -> WeightCompressor:
        """Rounding to nearest on a grid of as many bits, without a search for scales."""
        from paceline.compress.quantize.rtn import RoundToNearest

        bits, group, symmetric = _GRIDS[self._block_type]
        return RoundToNearest(bits, group, symmetric, search=0)

    def for_matrix(self, name: str, config: ModelConfig) -> WeightCompressor:
        """Return the method with the type that a mix chooses for a matrix."""
        mix = MIXES.get(self.type.upper())
        return replace(self, type=mix.choose(Position.of((name,), config)).lower()) if mix else self

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        from paceline.models.formats.gguf_quantize import quantize
        from paceline.models.tensors import BlockQuantized, Dense

        values = weight.numpy()
        kind = fit_type(self._block_type, values.shape[1])
        squares = stats.mean_squares if self.imatrix else None
        importance = None if squares is None else squares.numpy()
        try:
            if self.feedback and stats.second_moment is not None and kind != "F16":
                factor = _factor(stats.second_moment, self.damping, self.name)
                data = _round_with_feedback(kind, values, importance, factor.numpy())
            else:
                data = quantize(kind, values, importance)
        except ModelError as error:
            raise MethodError(f"{self.name}: {error}") from None
        if kind == "F16":
            return Dense(data.view("<f2"), "F16")
        return BlockQuantized(kind, data, values.shape[1])

    def note(self, shape: tuple[int, int]) -> str | None:
        """Tell of a matrix whose rows are no whole blocks."""
        wanted = self._block_type
        kind = fit_type(wanted, shape[1])
        if kind == wanted:
            return None
        return f"{kind} instead of {wanted}: rows of {shape[1]} are no whole blocks of it"

    @property
    def _block_type(self) -> str:
        mix = MIXES.get(self.type.upper())
        return mix.type if mix else self.type.upper()


@keep_last
def _factor(moment: Tensor, damping: float, name: str) -> Tensor:
    return inverse_factor(moment, damping, name)


def _round_with_feedback(
    kind: str, values: Floats, importance: Floats | None, factor: Floats
) -> NDArray[np.uint8]:
    """Return rows in a type, rounded one input after another.

    The scales of a block are searched when its first input is reached, from the weights as they are
    then; the error of each input is made up for by those that are still to come.

    Args:
        kind: of blocks.
        values: float32 [out, in].
        importance: of the inputs, [in], or None.
        factor: upper Cholesky factor of the inverse of the inputs' second moment, [in, in].
    """
    from paceline.models.formats.gguf_codes import BlockGrid, with_codes
    from paceline.models.formats.gguf_quantize import quantize
    from paceline.models.formats.gguf_types import TYPES

    rest, width = values.copy(), TYPES[kind].weights
    packed = []
    for start in range(0, values.shape[1], width):
        end = start + width
        seen = None if importance is None else importance[start:end]
        part = np.ascontiguousarray(rest[:, start:end])
        blocks = quantize(kind, part, seen)
        grid = BlockGrid.of(kind, blocks)
        codes = np.empty(part.shape, np.uint8)
        errors = np.empty_like(part)
        for column in range(width):
            at = start + column
            codes[:, column], rounded = grid.round(column, part[:, column])
            errors[:, column] = (part[:, column] - rounded) / factor[at, at]
            part[:, column:] -= errors[:, column, None] * factor[at, at:end]
        rest[:, end:] -= errors @ factor[start:end, end:]
        packed.append(with_codes(kind, blocks, codes))
    return np.concatenate(packed, 1)

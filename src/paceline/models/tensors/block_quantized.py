"""Matrices in the block types of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError, unknown
from paceline.models.formats.gguf_types import TYPES, dequantize
from paceline.models.tensors.base import Arrays, Index, Linear


@dataclass(frozen=True, slots=True, eq=False)
class BlockQuantized(Linear):
    """Rows of blocks, each with its codes and scales, byte for byte as GGUF stores them.

    Attributes:
        type: a name of `gguf_types.TYPES`, e.g. `Q4_K`.
        data: uint8 [out, bytes of a row].
        inputs: of a row, a multiple of the type's block.
    """

    type: str
    data: NDArray[np.uint8]
    inputs: int

    def __post_init__(self) -> None:
        """Check that the bytes are rows of so many inputs."""
        if self.type not in TYPES:
            raise ModelError(unknown("block type", self.type, TYPES))
        if not isinstance(self.inputs, int | np.integer):
            raise ModelError(f"a row has {self.inputs!r:.40} inputs, expected a whole number")
        row = TYPES[self.type].row_bytes(self.inputs)
        if self.data.dtype != np.uint8 or self.data.ndim != 2 or self.data.shape[1] != row:
            raise ModelError(
                f"data is {self.data.dtype} {list(self.data.shape)}, expected uint8 [out, {row}] "
                f"for {self.inputs} inputs in {self.type}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.data.shape[0], self.inputs

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.data.nbytes

    @property
    def format(self) -> str:
        """Name of the type in lower case, as formats of the native engine are called."""
        return self.type.lower()

    def dense(self) -> Floats:
        """Return the values by the type's formula; see `gguf_types`."""
        return dequantize(self.type, self.data)

    def is_finite(self) -> bool:
        """Return whether no value is infinite or no number."""
        return TYPES[self.type].is_finite(self.data)

    def rows(self, index: Index) -> BlockQuantized:
        """Return some rows; a view where `index` is a slice."""
        return BlockQuantized(self.type, self.data[index], self.inputs)

    def _meta(self) -> dict[str, Any]:
        return {"type": self.type, "inputs": self.inputs}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"data": self.data}

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> BlockQuantized:
        return cls(meta["type"], arrays["data"], meta["inputs"])

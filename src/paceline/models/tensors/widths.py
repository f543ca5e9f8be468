"""A matrix in several widths, each of its own codes, of which one is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import Arrays, Index, Linear, Nested
from paceline.models.tensors.composed import part_of, prefixed
from paceline.models.tensors.grouped import Grouped


@dataclass(frozen=True, slots=True, eq=False)
class Widths(Nested):
    """Integers in groups of several widths that share nothing; the widest counts by default.

    Attributes:
        parts: of the same shape, with ascending bits.
        losses: float32 [parts], the share of the squares that is missed with each.
    """

    parts: tuple[Grouped, ...]
    losses: Floats

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        if not self.parts or not all(isinstance(part, Grouped) for part in self.parts):
            raise ModelError("a matrix of several widths has no parts, or others than integers")
        shapes = {part.shape for part in self.parts}
        if len(shapes) > 1 or list(self.widths) != sorted(set(self.widths)):
            raise ModelError(
                f"widths are {list(self.widths)} of shapes {sorted(shapes)}, expected ascending "
                "ones of one shape"
            )
        self._check_losses(len(self.parts))

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a code of each part."""
        return tuple(part.bits for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.parts[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and of the losses."""
        return sum(part.nbytes for part in self.parts) + self.losses.nbytes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each part: one is loaded; see `Nested.sizes`."""
        return tuple(part.nbytes for part in self.parts)

    def dense(self) -> Floats:
        """Return the widest part."""
        return self.parts[-1].dense()

    def first(self, count: int) -> Linear:
        """Return the widest of the first parts, as integers that every engine multiplies."""
        return self.parts[min(count, len(self.parts)) - 1]

    def rows(self, index: Index) -> Widths:
        """Return some rows."""
        return Widths(tuple(part.rows(index) for part in self.parts), self.losses)

    def _meta(self) -> dict[str, Any]:
        return {"parts": len(self.parts)}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {"losses": self.losses}
        for number, part in enumerate(self.parts):
            arrays |= prefixed(f"part{number}", part)
        return arrays

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Widths:
        parts = tuple(part_of(f"part{number}", arrays) for number in range(meta["parts"]))
        return cls(parts, arrays["losses"])  # type: ignore[arg-type]

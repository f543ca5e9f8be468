"""The contract of stored matrices, and what the forms share.

Every form is a frozen dataclass with a slow reference `dense()`, its size, and named arrays to
save. `dense()` is defined arithmetic: float32, each operation rounded once and in the order that
the class states, so that it gives the same bits everywhere.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.formats.bits import Codes, packed_size, unpack_bits

Arrays = Mapping[str, NDArray[Any]]
Index = slice | NDArray[np.intp]

META = "meta"  # JSON in uint8: the form and its numbers
FLOATS: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

_TOGETHER = 1 << 15  # entries of a product that are summed at once


def widen(values: NDArray[Any], dtype: str) -> Floats:
    """Return stored floats as float32; `BF16` values are bits in uint16."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def narrow(values: Floats, dtype: str) -> NDArray[Any]:
    """Return float32 values in a narrower type that holds them exactly.

    Raises:
        ModelError: the type cannot hold one of them.
    """
    if dtype == "BF16":
        stored: NDArray[Any] = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(FLOATS[dtype])
    if not np.array_equal(widen(stored, dtype), values):
        raise ModelError(f"some values are no {dtype} numbers; keep them as F32")
    return stored


class Linear(ABC):
    """A matrix [out, in] in one of the stored forms."""

    __slots__ = ()

    _forms: ClassVar[dict[str, type[Linear]]] = {}

    def __init_subclass__(cls) -> None:
        """Register a form under its name, for `from_tensors`."""
        if "_build" in cls.__dict__:  # not the contracts between
            Linear._forms[cls.__name__] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays of `tensors()`, without its `meta`."""

    @property
    def ndim(self) -> int:
        """Number of axes, always 2."""
        return 2

    @abstractmethod
    def dense(self) -> Floats:
        """Return the matrix, float32 [out, in], C-contiguous: the slow reference."""

    @abstractmethod
    def rows(self, index: Index) -> Linear:
        """Return some rows (outputs), in the order of `index`."""

    @abstractmethod
    def _meta(self) -> dict[str, Any]:
        """Return the numbers that `_build` needs besides arrays."""

    @abstractmethod
    def _arrays(self) -> dict[str, NDArray[Any]]:
        """Return what `_build` needs, as it is saved."""

    @classmethod
    @abstractmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> Linear:
        """Return the matrix that `_meta` and `_arrays` describe."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return named arrays to save, from which `from_tensors` makes the same matrix."""
        text = json.dumps({"form": type(self).__name__, **self._meta()})
        return {META: np.frombuffer(text.encode(), np.uint8), **self._arrays()}

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return `dense()` where NumPy wants an array."""
        return np.array(self.dense(), dtype, copy=copy)


class Nested(Linear):
    """A matrix in blocks, the first of which are a coarser version of it: it fits any size.

    Attributes:
        losses: float32 [blocks], the share of the output's energy that is missed with a block and
            those before it; never rising.
    """

    __slots__ = ()

    losses: Floats

    @abstractmethod
    def first(self, count: int) -> Linear:
        """Return the matrix of the first blocks, at least one."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a code with each number of blocks; empty where blocks are no bits of codes."""
        return ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of the first block, of the first two, and so on; the last of all that is loaded."""
        return tuple(self.first(count).nbytes for count in range(1, len(self.losses) + 1))

    def _check_losses(self, blocks: int) -> None:
        check_floats("losses", self.losses, (blocks,))
        if (np.diff(self.losses) > 0).any():
            raise ModelError("the losses of the blocks rise, expected each block to lose less")


def nested_forms() -> frozenset[str]:
    """Return the names of the nested forms in lower case, as `Packed.format` has them."""
    return frozenset(
        name.lower() for name, form in Linear._forms.items() if issubclass(form, Nested)
    )


def from_tensors(arrays: Arrays) -> Linear:
    """Return the matrix that `Linear.tensors` described.

    Raises:
        ModelError: an array is missing, or does not fit the others.
    """
    try:
        meta = json.loads(bytes(arrays[META]))
        return Linear._forms[meta["form"]]._build(meta, arrays)
    except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ModelError(f"these arrays describe no stored matrix: {error!r:.80}") from None


def to_dense(values: Linear | NDArray[Any]) -> Floats:
    """Return a weight as float32, C-contiguous: `dense()` of a matrix, a vector as it is."""
    if isinstance(values, Linear):
        return values.dense()
    return np.require(values, np.float32, ["C", "A"])


def check_floats(name: str, values: Floats, shape: tuple[int, ...]) -> None:
    """Refuse what is not float32, of another shape, or not finite."""
    if values.dtype != np.float32 or values.shape != shape:
        raise ModelError(
            f"{name} are {values.dtype} {list(values.shape)}, expected float32 {list(shape)}"
        )
    if not np.isfinite(values).all():
        raise ModelError(f"{name} hold NaN or infinite values")


def check_group(group: int) -> None:
    """Refuse groups of no inputs, or of more than an index can count."""
    if not isinstance(group, int | np.integer) or not 1 <= group < 1 << 31:
        raise ModelError(
            f"groups have {group!r:.40} inputs, expected a whole number of at least 1 and below "
            "2 ** 31"
        )


def multiply(left: Floats, right: Floats) -> Floats:
    """Return the product of [out, rank] and [rank, in], float32 [out, in].

    Outer products in the order of the ranks, each rounded and added: the same bits everywhere.
    """
    values = np.zeros((len(left), right.shape[1]), np.float32)
    step = max(1, _TOGETHER // max(right.shape[1], 1))
    for start in range(0, len(left), step):  # a few rows at a time, which stay in the cache
        part, sums = left[start : start + step], values[start : start + step]
        room = np.empty_like(sums)
        for rank in range(len(right)):
            np.multiply(part[:, rank, None], right[rank], out=room)
            sums += room
    return values


def take(values: NDArray[Any] | None, index: Index) -> Any:
    """Return some rows of an array that may be absent."""
    return None if values is None else values[index]


def unpack_rows(packed: Codes, bits: int, count: int) -> Codes:
    """Return `count` integers along the last axis, from exactly as many bytes as they take.

    Raises:
        ModelError: there are more bytes, or fewer.
    """
    if not packed.ndim or packed.shape[-1] != packed_size(count, bits):
        raise ModelError(
            f"codes are packed as {list(packed.shape)} bytes, expected {packed_size(count, bits)} "
            f"for {count} integers of {bits} bits"
        )
    return unpack_bits(packed, bits, count)

"""Checkpoints that hold only what differs from another one, their base.

`quantization_config` has the base's path and fingerprint. A matrix that the checkpoint lacks is the
base's; one in the form `Sparse` is the base's with some weights replaced, in the same type, so that
what is read is what was written to the bit. Vectors and matrices in other forms are whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError
from paceline.models.formats.packed import FileTensor, Packed
from paceline.models.formats.safetensors import Stored
from paceline.models.tensors import Dense, Linear, Sparse, narrow, widen

BASE = "base"
_BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}

Arrays = Mapping[str, tuple[str, NDArray[Any]]]


class BaseWeights(Protocol):
    """What is read of a base: its weights by canonical names."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def stored(self, name: str) -> Linear | Stored:
        """See `Weights.stored`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Weights.shape`."""

    def float_type(self, name: str) -> str | None:
        """See `Weights.float_type`."""


@dataclass(frozen=True)
class Base:
    """The checkpoint that another one holds the differences from.

    Attributes:
        path: a folder or a file.
        fingerprint: of it.
        weights: None until it is opened.
    """

    path: Path
    fingerprint: str
    weights: BaseWeights | None = None

    @classmethod
    def of(cls, values: object) -> Base:
        """Read the entry of a `quantization_config`.

        Raises:
            ModelError: it is none.
        """
        if isinstance(values, Mapping) and values.keys() == {"path", "fingerprint"}:
            path, mark = values["path"], values["fingerprint"]
            if isinstance(path, str) and isinstance(mark, str) and path and "\0" not in path:
                return cls(Path(path), mark)
        raise ModelError(
            f"the base in config.json is {values!r:.80}, expected its path and its fingerprint"
        )

    @classmethod
    def named(cls, path: Path, fingerprint: str) -> Base:
        """Return a base that is named from anywhere."""
        return cls(path.resolve(), fingerprint)

    @property
    def values(self) -> dict[str, str]:
        """The entry of a `quantization_config`."""
        return {"path": str(self.path), "fingerprint": self.fingerprint}

    def find(self, folder: Path) -> Path:
        """Return where the base is: at its path, or beside the checkpoint that names it.

        Raises:
            ModelError: it is at neither.
        """
        for path in (self.path, folder.parent / self.path.name):
            if path.exists():
                return path
        raise ModelError(
            f"{folder} holds changes to {self.path}, which is not there; put {self.path.name} "
            f"beside it, into {folder.parent}"
        )

    def check(self, folder: Path, path: Path, fingerprint: str) -> None:
        """Refuse another checkpoint than the one that the changes are to.

        Raises:
            ModelError: its fingerprint differs.
        """
        if fingerprint != self.fingerprint:
            raise ModelError(
                f"{folder} holds changes to {path} as it was, and that is another checkpoint now; "
                "restore it, or compress again"
            )

    def with_weights(self, weights: BaseWeights) -> Base:
        """Return the base with its weights."""
        return replace(self, weights=weights)

    def changed(self, what: str, name: str, changes: Packed) -> Packed:
        """Return a matrix of which a checkpoint holds some weights.

        Args:
            what: for errors.
            name: canonical.
            changes: as they are stored; other forms than `Sparse` are whole matrices.

        Raises:
            ModelError: the base has no such matrix of floating-point numbers.
        """
        if changes.format != Sparse.__name__.lower():
            return changes
        weights = self._weights
        kind = weights.float_type(name) if name in weights else None
        if kind is None or weights.shape(name) != changes.shape:
            raise ModelError(f"{what} holds changes to a matrix that {self.path} does not have")
        return Packed(changes.shape, kind.lower(), partial(_changed, what, weights, name, changes))

    def completed(self, tensors: dict[str, FileTensor]) -> dict[str, FileTensor]:
        """Return the tensors of a checkpoint with the matrices that only the base has."""
        weights = self._weights
        for name in weights:
            shape = weights.shape(name)
            kind = weights.float_type(name)
            if name not in tensors and len(shape) == 2 and kind is not None:
                rows, columns = shape
                read = partial(_whole, weights, name)
                tensors[name] = Packed((rows, columns), kind.lower(), read)
        return tensors

    @property
    def _weights(self) -> BaseWeights:
        if self.weights is None:
            raise ModelError(f"the base {self.path} is not open")
        return self.weights


def base_of(settings: Mapping[str, Any]) -> Base | None:
    """Return the base that a config.json names; None where it names none.

    Raises:
        ModelError: the entry is not one.
    """
    scheme = settings.get("quantization_config")
    values = scheme.get(BASE) if isinstance(scheme, Mapping) else None
    return None if values is None else Base.of(values)


def changes(arrays: Arrays, base: BaseWeights) -> dict[str, tuple[str, NDArray[Any]]]:
    """Return what is stored of the tensors of a checkpoint beside its base.

    Args:
        arrays: (type, values) by canonical name.
        base: its weights.
    """
    from paceline.models.formats.stored_forms import arrays_of

    kept: dict[str, tuple[str, NDArray[Any]]] = {}
    for name, (kind, values) in arrays.items():
        form = _difference(name, kind, values, base)
        if form is None:
            kept[name] = (kind, values)
        elif len(form.values):
            kept |= arrays_of(name, form)
    return kept


def _difference(name: str, kind: str, values: NDArray[Any], base: BaseWeights) -> Sparse | None:
    """Return what a matrix has that its base has not; None where it is better stored whole."""
    if values.ndim != 2 or name not in base or base.shape(name) != values.shape:
        return None
    old = base.float_type(name)
    if kind not in _BITS or old is None:
        return None
    before = _whole(base, name)
    try:
        new = values if kind == old else narrow(widen(values, kind), old)
    except ModelError:
        return None
    bits = _BITS[old]
    mask = np.ascontiguousarray(new).view(bits) != np.ascontiguousarray(before.values).view(bits)
    form = Sparse(mask, np.ascontiguousarray(new)[mask], old)
    return form if form.nbytes < values.nbytes else None


def _whole(weights: BaseWeights, name: str) -> Dense:
    matrix = weights.stored(name)
    assert isinstance(matrix, Dense), "the type of a matrix says that it is one of numbers"
    return matrix


def _changed(what: str, weights: BaseWeights, name: str, changes: Packed) -> Dense:
    """Return a matrix of the base with the weights that are stored in their places."""
    before, new = _whole(weights, name), changes.read()
    if not isinstance(new, Sparse) or new.dtype != before.dtype:
        raise ModelError(f"{what} holds changes in another type than {before.dtype}")
    values = np.array(before.values)
    values[new.mask] = new.values
    return Dense(values, before.dtype)

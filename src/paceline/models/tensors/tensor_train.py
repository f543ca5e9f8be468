"""Matrices as matrix product operators: chains of tensors that are multiplied along their bonds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.tensors.base import Arrays, Index, Linear, multiply
from paceline.models.tensors.composed import part_of, prefixed
from paceline.models.tensors.dense import Dense

_SITES = 16  # at most: arrays of two axes for each are within NumPy's limit


@dataclass(frozen=True, slots=True, eq=False)
class TensorTrain(Linear):
    """A matrix product operator: output o = (o1, o2, ...) and input i = (i1, i2, ...).

    An entry is the product of the matrices `cores[k][:, ok, ik, :]` of all sites k.

    Attributes:
        cores: one for each site, [bond before, outputs * inputs * bond behind]; the bonds at both
            ends are 1.
        outputs: of each site; their product is the number of outputs.
        inputs: of each site.
    """

    cores: tuple[Linear, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check that the tensors fit together."""
        sizes = [self.outputs, self.inputs, self.cores]
        if not 2 <= len(self.cores) <= _SITES or any(
            len(each) != len(self.cores) for each in sizes
        ):
            raise ModelError(
                f"there are {len(self.cores)} tensors for {len(self.outputs)} outputs and "
                f"{len(self.inputs)} inputs, expected as many of each, at least two and at most "
                f"{_SITES}"
            )
        if min(*self.outputs, *self.inputs) < 1:
            raise ModelError(f"sites are {self.outputs} and {self.inputs}, expected positive sizes")
        bonds = [core.shape[0] for core in self.cores]
        for core, outputs, inputs, after in zip(
            self.cores, self.outputs, self.inputs, [*bonds[1:], 1], strict=True
        ):
            if bonds[0] != 1 or core.shape[1] != outputs * inputs * after:
                raise ModelError(
                    f"a tensor is {list(core.shape)}, expected {outputs} x {inputs} x {after} "
                    "columns, and one row in the first"
                )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return prod(self.outputs), prod(self.inputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(core.nbytes for core in self.cores)

    def dense(self) -> Floats:
        """Return the matrix: products of `multiply`, site after site."""
        first, *others = (core.dense() for core in self.cores)
        rows = first.reshape(-1, len(others[0]))
        for core, after in zip(others, [*(len(each) for each in others[1:]), 1], strict=True):
            rows = multiply(rows, core).reshape(-1, after)
        count = len(self.cores)
        sites = [size for site in zip(self.outputs, self.inputs, strict=True) for size in site]
        order = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
        return np.ascontiguousarray(rows.reshape(sites).transpose(order).reshape(self.shape))

    def rows(self, index: Index) -> Dense:
        """Return some rows as numbers."""
        return Dense(np.ascontiguousarray(self.dense()[index]))

    def _meta(self) -> dict[str, Any]:
        return {"outputs": list(self.outputs), "inputs": list(self.inputs)}

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        for number, core in enumerate(self.cores):
            arrays |= prefixed(str(number), core)
        return arrays

    @classmethod
    def _build(cls, meta: Mapping[str, Any], arrays: Arrays) -> TensorTrain:
        outputs, inputs = (tuple(map(int, meta[name])) for name in ("outputs", "inputs"))
        cores = tuple(part_of(str(number), arrays) for number in range(len(outputs)))
        return cls(cores, outputs, inputs)

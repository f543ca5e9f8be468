"""Layers of the reference engine whose matrices stay as they are stored until they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from paceline.core import Floats
from paceline.models.blocks import Matrix
from paceline.models.rounding import rounded_product
from paceline.models.tensors import Linear, RoundedInputs, SignBlocks, Sparse, to_dense
from paceline.models.weights import Weights


class StoredLayers:
    """The tensors of each layer, expanded each time that it runs.

    The weights of a checkpoint stay in its files: each layer is read from them, goes to the device
    in its stored form where that is a bitmap or blocks of signs, and is dropped behind it. While a
    layer runs on another device than the CPU, the next one is prepared by a thread.

    Based on "Endor: Hardware-Friendly Sparse Format for Offloaded LLM Inference".

    Args:
        weights: canonical name -> float32 array or stored matrix.
        layers: number of layers.
        device: where the tensors go.
        dtype: of the expanded tensors.
    """

    def __init__(
        self,
        weights: Mapping[str, Linear | Floats],
        layers: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype
        self._names: list[list[str]] = [[] for _ in range(layers)]
        for name in weights:
            if name.startswith("layers."):
                self._names[int(name.split(".", 2)[1])].append(name)
        # On the CPU the threads of torch are busy with the layer that runs.
        ahead = device.type != "cpu"
        self._pool = ThreadPoolExecutor(1, "paceline-layers") if ahead else None
        self._next: tuple[int, Future[dict[str, Matrix]]] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Matrix]:
        """Return the tensors of a layer by their names in it; a thread begins with the next."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == index:
            layer = ahead[1].result()
        else:
            layer = self._expand(index)
        if self._pool is not None:
            after = (index + 1) % len(self._names)
            self._next = (after, self._pool.submit(self._expand, after))
        return layer

    def _expand(self, index: int) -> dict[str, Matrix]:
        layer: dict[str, Matrix] = {}
        for name in self._names[index]:
            weight = self._weights[name]
            layer[name.split(".", 2)[2]] = multiplied(
                weight, expand(weight, self._device, self._dtype)
            )
        return layer


def shared_matrix(
    weights: Mapping[str, Linear | Floats],
    name: str,
    layers: Sequence[Mapping[str, Matrix]],
    device: torch.device,
    dtype: torch.dtype,
) -> Matrix | None:
    """Return the matrix of another layer that a weight is; with its product of low rank, if any.

    None where the weight is its layer's own, or the other layer comes later.
    """
    other = weights.shared_with(name) if isinstance(weights, Weights) else None
    if other is None or not isinstance(weights, Weights):
        return None
    _, index, part = other.split(".", 2)
    base = layers[int(index)].get(part)
    if base is None:
        return None
    term = weights.shared_term(name)
    if term is None:
        return base
    right, left = (torch.tensor(each.dense()).to(device, dtype) for each in (term.right, term.left))

    def product(x: Tensor) -> Tensor:
        whole = F.linear(x, base) if isinstance(base, Tensor) else base(x)
        return whole + F.linear(F.linear(x, right), left)

    return product


def multiplied(weight: Linear | Floats, matrix: Tensor) -> Matrix:
    """Return what stands for a weight in a layer: its values, or its products of rounded inputs."""
    return rounded_product(weight, matrix) if isinstance(weight, RoundedInputs) else matrix


def expand(weight: Linear | Floats, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a weight as a tensor on a device.

    Sparse matrices and blocks of signs go there as they are stored, and are expanded there; other
    forms are expanded here.
    """
    if isinstance(weight, SignBlocks):
        return _expand_signs(weight, device).to(dtype)
    if isinstance(weight, Sparse) and device.type != "cpu":
        return _expand_sparse(weight, device, dtype)
    return torch.tensor(to_dense(weight)).to(device, dtype)


def _expand_sparse(matrix: Sparse, device: torch.device, dtype: torch.dtype) -> Tensor:
    rows, columns = matrix.shape
    mask = _bits(np.packbits(matrix.mask, axis=1, bitorder="little"), columns, device).bool()
    expanded = torch.zeros(rows, columns, dtype=dtype, device=device)
    values = np.array(matrix.values)
    stored = torch.from_numpy(values.view(np.int16) if matrix.dtype == "BF16" else values)
    stored = stored.to(device)
    if matrix.dtype == "BF16":
        stored = stored.view(torch.bfloat16)
    expanded[mask] = stored.to(dtype)
    return expanded


def _expand_signs(matrix: SignBlocks, device: torch.device) -> Tensor:
    """Return the sum of blocks, float32; products of the device, not those of `dense`."""
    total = torch.zeros(matrix.shape, device=device)
    for packed, *factors in zip(matrix.signs, matrix.left, matrix.right, strict=True):
        left, right = (torch.from_numpy(np.array(part)).to(device).float() for part in factors)
        signs = _bits(packed, matrix.shape[1], device).float().mul_(2).sub_(1)
        total.addcmul_(left @ right, signs)
    return total


def _bits(packed: NDArray[np.uint8], columns: int, device: torch.device) -> Tensor:
    """Return the bits of rows [R, bytes], lowest first, uint8 [R, columns] on a device."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=columns, bitorder="little"))
    return _unpack(torch.from_numpy(np.array(packed)).to(device), columns)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the bits of uint8 [R, bytes], lowest first, uint8 [R, columns]."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[..., None].bitwise_right_shift(places) & 1).flatten(1)[:, :columns]

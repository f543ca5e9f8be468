"""Layers of the reference engine whose matrices stay as they are stored until they run."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from paceline.core import Floats
from paceline.models.tensors import Linear, Sparse, to_dense


class StoredLayers:
    """The tensors of each layer, expanded each time that it runs.

    The weights of a checkpoint stay in its files: each layer is read from them, goes to the device
    in its stored form where that is a bitmap, and is dropped behind it. While a layer runs, the
    next one is prepared in another thread, so that two are expanded at a time.

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
        self._pool = ThreadPoolExecutor(1, "paceline-layers")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer by their names in it, and begin with the layer after it."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == index:
            layer = ahead[1].result()
        else:
            layer = self._expand(index)
        after = (index + 1) % len(self._names)
        self._next = (after, self._pool.submit(self._expand, after))
        return layer

    def _expand(self, index: int) -> dict[str, Tensor]:
        return {
            name.split(".", 2)[2]: expand(self._weights[name], self._device, self._dtype)
            for name in self._names[index]
        }


def expand(weight: Linear | Floats, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a weight as a tensor on a device.

    A sparse matrix goes there as its bitmap and the values that are kept, and is expanded there;
    other forms are expanded here.
    """
    if not isinstance(weight, Sparse) or device.type == "cpu":
        return torch.tensor(to_dense(weight)).to(device, dtype)
    rows, columns = weight.shape
    bits = torch.from_numpy(np.packbits(weight.mask, bitorder="little")).to(device)
    places = torch.arange(8, device=device, dtype=torch.uint8)
    mask = (bits[:, None].bitwise_right_shift(places) & 1).flatten()[: rows * columns].bool()
    matrix = torch.zeros(rows * columns, dtype=dtype, device=device)
    matrix[mask] = _on_device(weight, device).to(dtype)
    return matrix.view(rows, columns)


def _on_device(matrix: Sparse, device: torch.device) -> Tensor:
    """Return the values of a sparse matrix, moved in the type in which they are stored."""
    values = np.ascontiguousarray(matrix.values)
    if matrix.dtype == "BF16":
        return torch.from_numpy(values.view(np.int16)).to(device).view(torch.bfloat16)
    return torch.from_numpy(np.array(values)).to(device)

"""What one training step reads: windows of the packed streams, and who sees whom in them.

B windows, T positions of a window.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.embedded_model.model import Mask

END_OF_TEXT = 0  # id of the token that begins every document


def load(work: Path, part: str) -> dict[str, NDArray[np.uint16]]:
    """Read source -> stream of one part, `train` or `validation`."""
    names = json.loads((work / "pack.json").read_text())
    return {name: np.load(work / f"{name}.{part}.npy") for name in names}


class Windows:
    """Windows of T + 1 tokens in an order that is new in every pass over the data.

    Which windows a step reads depends on its number alone, so that resuming is exact.
    """

    def __init__(self, stream: NDArray[np.uint16], length: int, count: int) -> None:
        self.stream, self.length, self.count = stream, length, count
        self.each = (len(stream) - 1) // length - 1  # windows of a pass, wherever it starts
        if self.each < 1:
            raise SystemExit(f"{len(stream)} tokens are too few for windows of {length}")

    def __getitem__(self, step: int) -> Tensor:
        """Return int64 [B, T + 1]."""
        places = range(step * self.count, (step + 1) * self.count)
        starts = [self._start(*divmod(place, self.each)) for place in places]
        rows = [self.stream[start : start + self.length + 1] for start in starts]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _start(self, turn: int, place: int) -> int:
        offset, order = self._order(turn)
        return offset + int(order[place]) * self.length

    @lru_cache(maxsize=2)  # noqa: B019 (one object a run)
    def _order(self, turn: int) -> tuple[int, NDArray[np.int64]]:
        draw = np.random.default_rng(turn)
        return int(draw.integers(self.length)), draw.permutation(self.each)


def documents(tokens: Tensor) -> Tensor:
    """Count documents in windows [B, T] from 0 or 1; a new one begins at its first token."""
    return (tokens == END_OF_TEXT).cumsum(dim=1, dtype=torch.int32)


class Dense:
    """Masks as bool [B, 1, T, T]: any device."""

    def __call__(self, tokens: Tensor) -> Mask:
        """Return the mask of windows [B, T]: earlier positions of the same document."""
        found = documents(tokens)
        same = found[:, None, :, None] == found[:, None, None, :]
        return same.tril()


class Blocks:
    """Masks that skip whole blocks: for flex attention, fast on a GPU.

    The rule reads a buffer that every call overwrites: the rule stays the same object, so compiled
    code stays valid. A mask is good until the next call; finish its backward pass before.
    """

    def __init__(self, windows: int, length: int, device: str) -> None:
        found = torch.zeros(windows, length, dtype=torch.int32, device=device)

        def sees(window: Tensor, _head: Tensor, position: Tensor, other: Tensor) -> Tensor:
            return (found[window, position] == found[window, other]) & (position >= other)

        self.found, self.sees = found, sees

    def __call__(self, tokens: Tensor) -> Mask:
        """Return the mask of windows [B, T]; B and T as given at first."""
        self.found.copy_(documents(tokens))
        windows, length = self.found.shape
        return create_block_mask(
            self.sees, windows, None, length, length, device=self.found.device.type
        )

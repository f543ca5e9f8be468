"""Which calibration texts are trained on, and which decide whether training helped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

_HELD = 8  # one of so many texts is held out


class TextSplit:
    """Texts of training and texts that are held out: one in eight, the last ones.

    Of a single text, training has the first half of the positions and the second is held out.

    Args:
        count: of the texts.
        length: positions of a text.
        batch: texts of a step.
        seed: of their order.

    Attributes:
        trained: int64, indices of the texts of training.
        held: int64, indices of the others.
        trained_positions: of a text that count in training.
        held_positions: of a text that count afterwards.

    Raises:
        MethodError: there is one text of one position, which leaves none to judge by.
    """

    def __init__(self, count: int, length: int, batch: int, seed: int) -> None:
        import torch

        held = max(1, count // _HELD)
        self.held = torch.arange(count - held, count)
        self.trained = torch.arange(max(1, count - held))
        self.trained_positions = self.held_positions = slice(None)
        if count == 1:
            if length < 2:
                raise MethodError(
                    "one text of one token cannot be trained on and judged by; give more"
                )
            self.trained_positions = slice(0, length // 2)
            self.held_positions = slice(length // 2, None)
        self._batch, self._seed = batch, seed

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Yield indices of texts for each step, every text once before any comes again."""
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        queue = torch.empty(0, dtype=torch.int64)
        size = min(self._batch, len(self.trained))
        for _ in range(steps):
            if len(queue) < size:
                order = torch.randperm(len(self.trained), generator=generator)
                queue = torch.cat([queue, self.trained[order]])
            yield queue[:size]
            queue = queue[size:]

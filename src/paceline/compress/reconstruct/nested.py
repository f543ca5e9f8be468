"""Training of one model at several depths: its first layers predict tokens, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.recovery import Recovery

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights


@dataclass
class NestedRecovery(Recovery):
    """A distillation in which the states behind several depths share norm and head.

    The loss is the sum over depths of the divergence from the teacher's distributions.

    Attributes:
        depths: numbers of first layers, increasing; the last is that of the whole model.
    """

    depths: Sequence[int] = ()

    def errors(self, weights: Sequence[LayerWeights]) -> list[float]:
        """Return the divergence behind each depth on the texts that are held out."""
        import torch

        totals = [0.0] * len(self.depths)
        with torch.no_grad():
            for rows in torch.split(self.split.held, self.batch):
                texts = self.student.texts[rows]
                right = self._teach(texts)[:, self.split.held_positions]
                for place, x in enumerate(self._nested_states(texts, weights)):
                    part = self._divergence(right, x[:, self.split.held_positions])
                    totals[place] += part * len(rows)
        return [total / len(self.split.held) for total in totals]

    def _backwards(self, rows: Tensor) -> float:
        """Add the gradients of the loss on some texts; return it."""
        import torch

        texts, total = self.student.texts[rows], 0.0
        ends: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            right = self._teach(texts)[:, self.split.trained_positions]
        with torch.enable_grad():
            for x in self._nested_states(texts, self.trained_weights()):
                states = x[:, self.split.trained_positions]
                end = states.detach().requires_grad_()
                total += self._divergence(right, end, learn=True)
                assert end.grad is not None
                ends.append((states, end.grad))
            torch.autograd.backward([state for state, _ in ends], [grad for _, grad in ends])
        return total

    def _nested_states(self, texts: Tensor, weights: Sequence[LayerWeights]) -> Iterator[Tensor]:
        """Yield the outputs of the student's layers at each depth."""
        import torch

        from paceline.compress.whole_model import run_block

        x = self.student.embed(texts)
        for index, (shape, each) in enumerate(
            zip(self.student.config.layers, weights, strict=True)
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                x = run_block(self.student.config, shape, each, x)
            if index + 1 in self.depths:
                yield x

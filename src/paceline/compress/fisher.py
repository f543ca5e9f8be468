"""The Fisher information of the weights: how much the loss of texts changes with each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.base import MATRICES
from paceline.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.config import ModelConfig

_TEXTS, _LENGTH = 8, 256  # of the calibration texts that gradients are computed for
_BITS, _GROUP = 3, 32  # of the rounding whose price is the sensitivity of a matrix


@dataclass(frozen=True)
class Gradients:
    """Runs a model backwards, one block in memory at a time.

    Attributes:
        config: the model's shape.
        layer: reads the float32 tensors of a layer by its index.
        outer: float32 tensors outside the layers, `head` or a tied `embed` among them.
    """

    config: ModelConfig
    layer: Callable[[int], Mapping[str, Tensor]]
    outer: Mapping[str, Tensor]

    def fisher(self, tokens: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the diagonal of the Fisher information for each layer, the last one first.

        For a weight it is the sum over positions of the squared derivative of the texts' loss, in
        nats, by its product at that position.

        Args:
            tokens: int64 [B, T]; the first texts and positions are used.

        Yields:
            the layer's index, and float32 [out, in] for each of its matrices.

        Raises:
            ModelError: a gradient is no number.
        """
        import torch

        from paceline.models import blocks

        texts = tokens[:_TEXTS, :_LENGTH]
        positions = torch.arange(texts.shape[1])
        with torch.no_grad():
            inputs = [blocks.embed(texts, positions, self.config, self.outer)]
            for index in range(len(self.config.layers)):
                run = _Products(self.config, index, self.layer(index), positions)
                inputs.append(torch.cat([run(x) for x in torch.split(inputs[-1], 1)]))
        gradients = self._loss_gradients(inputs.pop(), texts)
        for index in reversed(range(len(self.config.layers))):
            run = _Products(self.config, index, self.layer(index), positions)
            x = inputs.pop()
            for text in range(len(texts)):
                gradients[text] = run.backward(x[text : text + 1], gradients[text])
            if not all(bool(each.isfinite().all()) for each in run.fisher.values()):
                raise ModelError(f"the gradients of block {index} are no numbers on the texts")
            yield index, run.fisher

    def _loss_gradients(self, states: Tensor, texts: Tensor) -> list[Tensor]:
        """Return the derivative of each text's loss by the last block's output [1, T, hidden]."""
        import torch
        from torch.nn import functional as F

        from paceline.models import blocks

        gradients = []
        for state, text in zip(torch.split(states, 1), texts, strict=True):
            x = state.detach().requires_grad_()
            final = blocks.final_state(x, self.config, self.outer)[0]
            logits = blocks.head(final, self.config, self.outer)
            loss = F.cross_entropy(logits[:-1], text[1:], reduction="sum")
            gradients.append(torch.autograd.grad(loss, x)[0])
        return gradients


class _Products:
    """One block whose products are watched: their inputs, and the gradients of their outputs."""

    def __init__(
        self, config: ModelConfig, index: int, weights: Mapping[str, Tensor], positions: Tensor
    ) -> None:
        import torch

        from paceline.models import blocks

        self._config, self._shape = config, config.layers[index]
        self._weights = weights
        self._mask = blocks.causal_mask(positions, self._shape)
        self._rotation = blocks.rotation_of(self._shape, positions)
        self.fisher = {
            name: torch.zeros_like(weights[name]) for name in MATRICES if name in weights
        }

    def __call__(self, x: Tensor, weights: Mapping[str, object] | None = None) -> Tensor:
        from paceline.models import blocks

        used: Mapping[str, object] = {**self._weights, **(weights or {})}
        return blocks.block(x, self._config, self._shape, used, self._mask, self._rotation)  # type: ignore[arg-type]

    def backward(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Add one text's squares to `fisher`; return the gradient by the block's input."""
        import torch
        from torch.nn import functional as F

        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def product(name: str) -> Callable[[Tensor], Tensor]:
            def multiply(seen: Tensor) -> Tensor:
                inputs[name] = seen.detach()
                outputs[name] = F.linear(seen, self._weights[name])
                return outputs[name]

            return multiply

        start = x.detach().requires_grad_()
        result = self(start, {name: product(name) for name in self.fisher})
        wanted = [start, *outputs.values()]
        first, *others = torch.autograd.grad(result, wanted, gradient)
        for name, each in zip(outputs, others, strict=True):
            squares = each.flatten(0, -2).square().T
            self.fisher[name] += squares @ inputs[name].flatten(0, -2).square()
        return first


def loss_of_rounding(weight: Tensor, fisher: Tensor) -> float:
    """Return by how much the loss rises for a weight, about, if a matrix is rounded to 3 bits.

    Half the Fisher information times the squared errors of rounding in groups of 32.
    """
    import torch

    from paceline.compress.base import Statistics
    from paceline.compress.quantize.rtn import RoundToNearest

    rounded = RoundToNearest(_BITS, _GROUP, symmetric=False).compress(weight, Statistics())
    errors = torch.from_numpy(rounded.dense()) - weight
    return float((fisher.double() * errors.square()).sum()) / 2 / weight.numel()


def extra_bits(losses: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return by how many bits each matrix should exceed the mean, so that the loss is smallest.

    A bit more quarters the squared errors: bits are best divided where the loss for a weight is
    the same everywhere, at half its binary logarithm above the mean.

    Args:
        losses: for a weight at equal bits, by name.
        sizes: numbers of weights.
    """
    from math import log2

    halves = {name: log2(max(loss, 1e-30)) / 2 for name, loss in losses.items()}
    mean = sum(halves[name] * sizes[name] for name in halves) / max(sum(sizes.values()), 1)
    return {name: half - mean for name, half in halves.items()}

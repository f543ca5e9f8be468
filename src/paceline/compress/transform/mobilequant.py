"""MobileQuant: train the scales of channels and fixed ranges of the activations together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import GROUPS, Block
from paceline.compress.input_range import InputRange
from paceline.compress.reconstruct.fake_quantize import fake_quantize
from paceline.compress.reconstruct.objective import Objective, round_through
from paceline.compress.transform.base import ChannelScales, TrainedParts, TrainedTransform
from paceline.core import Exactness
from paceline.registry import Source, check_range, transforms

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.quantize.base import Quantizer

_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18)  # of the largest input, tried as ranges
_TEXTS = 8  # on which ranges are searched
_SMALLEST = 1e-6  # range of inputs that are all zero


@transforms.register("mobilequant", Exactness.LOSSY)
@dataclass(frozen=True)
class MobileQuant(TrainedTransform):
    """Round the inputs of each matrix within one range for all positions, which is trained.

    Integer hardware wants activations with a fixed scale for a whole tensor. A share of the largest
    input is searched for each group of matrices with one input; then ranges and scales of channels
    are trained together on the outputs of the block, with its weights rounded to the grid of the
    quantizer that follows. Where the error on the held-out texts does not fall, the searched ranges
    stay and channels are not scaled. The reference engine rounds so; no kernel does.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate of the logarithms of scales and ranges, above 0 and up to 1. Default
            0.02.
        batch: texts of a step, 1 to 1024. Default 2.
        act_bits: of an input, 2 to 8. Default 8.
    """

    act_bits: int = 8

    source = Source(
        authors="Tan et al.",
        title="MobileQuant: Mobile-friendly Quantization for On-device Language Models",
        arxiv="2408.13933",
        section="section 3",
        note="symmetric ranges; activations between products, such as norms and softmax, stay "
        "floating-point numbers",
    )
    catalogue = (138,)
    missing = MappingProxyType(
        {138: "training through the whole model (it is done block by block), and integer kernels"}
    )
    examples = ("mobilequant:steps=8",)
    of_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        TrainedTransform.__post_init__(self)
        check_range(2, 8, self.name, act_bits=self.act_bits)

    def parts(self, block: Block, grid: Quantizer, objective: Objective) -> RangedInputs:
        """Return the scales of all channels, and the ranges that a search found."""
        parts = RangedInputs(block, grid, self.act_bits)
        parts.search(objective)
        return parts


class RangedInputs(TrainedParts):
    """The scales of the channels of a block, and the ranges of the inputs of its matrices."""

    def __init__(self, block: Block, grid: Quantizer, bits: int) -> None:
        import torch

        self._scales, self._grid, self._bits = ChannelScales(block), grid, bits
        self._groups = [[name for name in group if name in block.weights] for group in GROUPS]
        self._starts = _largest_inputs(block, [group for group in self._groups if group])
        self._logs = {name: torch.zeros((), requires_grad=True) for name in self._starts}

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the logarithms of scales and ranges."""
        return [*self._scales.groups(), *((log, 1.0) for log in self._logs.values())]

    def rounded(self) -> dict[str, Tensor | Callable[[Tensor], Tensor]]:
        """Return the scaled weights, the matrices as products of rounded inputs and weights."""
        scaled = self._scales.weights()
        weights: dict[str, Tensor | Callable[[Tensor], Tensor]] = dict(scaled)
        for group in self._groups:
            for name in group:
                limit = self._starts[group[0]] * self._logs[group[0]].exp()
                matrix = fake_quantize(scaled[name], self._grid)
                weights[name] = partial(_product, matrix=matrix, limit=limit, bits=self._bits)
        return weights

    def search(self, objective: Objective) -> None:
        """Take for each group the share of its largest input with the least error in training."""
        import torch

        with torch.no_grad():
            rows = objective.some_texts(_TEXTS)
            for name, largest in self._starts.items():
                errors = []
                for share in _SHARES:
                    self._starts[name] = largest * share
                    errors.append(float(objective.loss(self.rounded(), rows)))
                self._starts[name] = largest * _SHARES[errors.index(min(errors))]
            self._searched = dict(self._starts)

    def apply(self, block: Block) -> None:
        """Write the scaled weights and the ranges."""
        block.weights.update(self._scales.weights())
        self._write(block, {name: log.exp().item() for name, log in self._logs.items()})

    def skip(self, block: Block) -> None:
        """Write the ranges that the search found."""
        self._write(block, dict.fromkeys(self._logs, 1.0))

    def _write(self, block: Block, factors: dict[str, float]) -> None:
        for group in self._groups:
            for name in group:
                limit = self._searched[group[0]] * factors[group[0]]
                block.ranges[name] = InputRange(self._bits, limit)


def _product(x: Tensor, matrix: Tensor, limit: Tensor, bits: int) -> Tensor:
    """Return the product of inputs [..., in], rounded within a range, and a matrix [out, in].

    Gradients pass through the rounding, to the inputs within the range and to the range.
    """
    from torch.nn import functional as F

    top = 2 ** (bits - 1) - 1
    scale = limit / top
    return F.linear(round_through(x / scale).clamp(-top, top) * scale, matrix)


def _largest_inputs(block: Block, groups: list[list[str]]) -> dict[str, float]:
    """Return the largest magnitude of the inputs of each group, by its first matrix."""
    import torch
    from torch.nn import functional as F

    largest = dict.fromkeys((group[0] for group in groups), _SMALLEST)

    def product(name: str) -> Callable[[Tensor], Tensor]:
        matrix = block.weights[name]

        def multiply(x: Tensor) -> Tensor:
            largest[name] = max(largest[name], float(x.abs().max()))
            return F.linear(x, matrix)

        return multiply

    products = {name: product(name) for name in largest}
    watched: dict[str, Tensor | Callable[[Tensor], Tensor]] = {**block.weights, **products}
    with torch.no_grad():
        for text in torch.split(block.inputs, 1):
            block.run(watched, text)
    return largest

"""LLM-QFA: train adapters of several widths at once; each width is a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import ModelTuner, Statistics
from paceline.compress.reconstruct.descent import Descent
from paceline.compress.reconstruct.distillation import CompressedModel, Distillation, fixed_layer
from paceline.compress.reconstruct.grouped import TrainedGroups
from paceline.compress.reconstruct.objective import round_through
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights
    from paceline.models.tensors import Grouped, Linear

_OTHER = 0.25  # of the layers of a step have another width than the rest


@tuners.register("llm_qfa", Exactness.LOSSY)
@dataclass(frozen=True)
class LLMQFA(ModelTuner):
    """Train low-rank adapters for every width from `min_bits` to that of the quantizer, together.

    Widths share nothing, so that they do not disturb each other: each has codes and adapters of its
    own, which are added to the weights before these are rounded, so that nothing but integers is
    stored. Steps take the widths in turns, and some layers of a step another one, so that all
    average widths get as many steps. The loss is the divergence from the original's distributions.

    The file holds all widths: `--memory 3bits` loads one, `--memory 80MB` as many bits as fit, and
    `paceline convert --memory 3bits` writes a checkpoint of it. A width that training does not help
    on the held-out texts keeps the codes it had.

    Attributes:
        min_bits: of the narrowest width, 2 to 7, below the bits of the quantizer. Default 2.
        rank: of the adapters, 1 to 1024. Default 8.
        steps: of Adam, over all widths, 1 to 100000. Default 192.
        rate: learning rate in codes, above 0 and up to 1. Default 0.01.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    min_bits: int = 2
    rank: int = 8
    steps: int = 192
    rate: float = 0.01
    batch: int = 2

    source = Source(
        authors="Yi et al.",
        title="One QuantLLM for ALL: Fine-tuning Quantized LLMs Once for Efficient Deployments",
        arxiv="2405.20202",
        section="section 3",
        note="widths in turns instead of a schedule of rates; distilled, not fine-tuned on a task",
    )
    catalogue = (266,)
    missing = MappingProxyType(
        {
            266: "the search for the bits of each layer by an accuracy predictor: `--memory 80MB` "
            "gives bits by the squares that they save"
        }
    )
    examples = ("llm_qfa:steps=8", "llm_qfa:min_bits=3,rank=4,steps=8")
    own_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(2, 7, self.name, min_bits=self.min_bits)
        check_range(1, 1024, self.name, rank=self.rank)
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    def tune(self, model: CompressedModel) -> list[dict[str, Linear | Tensor]]:
        """See `ModelTuner`.

        Raises:
            MethodError: matrices are no integers in groups, of more bits than the narrowest width.
        """
        layers = [self._layer(model, index) for index in range(len(model.stored))]
        widths = sorted(
            {bits for layer in layers for part in layer.parts.values() for bits in part}
        )
        if not widths:
            raise MethodError(f"{self.name} trains integers in groups, and the recipe keeps all")
        distillation = Distillation(model, self.batch)
        before = {bits: distillation.error(_weights(layers, bits)) for bits in widths}
        parameters = [pair for layer in layers for pair in layer.groups()]
        descent = Descent(parameters, self.steps, self.rate)
        batches = distillation.split.batches(self.steps)
        for rows, chosen in zip(batches, _schedule(widths, len(layers), self.steps), strict=True):
            weights = [each.weights(bits) for each, bits in zip(layers, chosen, strict=True)]
            descent.step(distillation.loss(weights, rows))
        better = {
            bits for bits in widths if distillation.error(_weights(layers, bits)) < before[bits]
        }
        return [layer.stored(better) for layer in layers]

    def _layer(self, model: CompressedModel, index: int) -> _Layer:
        """Return the parameters of a layer."""
        from paceline.models.tensors import Grouped, Linear

        parts: dict[str, dict[int, AdaptedCodes]] = {}
        for name, stored in model.stored[index].items():
            if not isinstance(stored, Linear):
                continue
            if not isinstance(stored, Grouped) or stored.minima is not None:
                raise MethodError(
                    f"{self.name} trains integers in groups, and layers.{index}.{name} is stored "
                    "otherwise; put it behind rtn or gptq without scale_bits and levels"
                )
            if stored.bits <= self.min_bits:
                raise MethodError(
                    f"{self.name}:min_bits is {self.min_bits}, expected less than the "
                    f"{stored.bits} bits of layers.{index}.{name}"
                )
            weight = model.latent(index, name)
            seed = index * 100 + len(parts)
            parts[name] = {
                bits: AdaptedCodes(weight, _in_bits(stored, weight, bits), self.rank, seed + bits)
                for bits in range(self.min_bits, stored.bits + 1)
            }
        return _Layer(model.stored[index], parts)


class AdaptedCodes(TrainedGroups):
    """Integers in groups, rounded from weights to which a product of low rank is added."""

    def __init__(self, weight: Tensor, stored: Grouped, rank: int, seed: int) -> None:
        import torch

        super().__init__(weight, stored)
        self.start, self.exact = stored, weight
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(seed)
        right = torch.randn(min(rank, *weight.shape), columns, generator=generator)
        self._right = (right / len(right) ** 0.5).requires_grad_()
        self._left = torch.zeros(rows, len(right), requires_grad=True)
        self._places = self._codes.detach()

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the factors, in codes."""
        return [(self._left, 1.0), (self._right, 1.0)]

    def weight(self) -> Tensor:
        """Return the values of the codes that the adapted weights round to."""
        codes = round_through(self._adapted())
        scales = self._scales[:, self._at]
        return (codes - self._offsets[:, self._at]) * scales

    def stored(self) -> Grouped:
        """Return the codes that the adapted weights round to."""
        import numpy as np
        import torch

        with torch.no_grad():
            codes = self._adapted().round().numpy().astype(np.uint8)
        return replace(self.start, codes=codes)

    def _adapted(self) -> Tensor:
        adapted: Tensor = (self._places + self._left @ self._right).clamp(0, self._top)
        return adapted


class _Layer:
    """One layer with the adapters of every width of its matrices."""

    def __init__(
        self,
        stored: Mapping[str, Linear | Tensor],
        parts: Mapping[str, Mapping[int, AdaptedCodes]],
    ) -> None:
        self._stored, self.parts = stored, parts
        self._fixed = fixed_layer({k: each for k, each in stored.items() if k not in parts})

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters of all widths."""
        return [
            pair for part in self.parts.values() for each in part.values() for pair in each.groups()
        ]

    def weights(self, bits: int) -> LayerWeights:
        """Return the weights in a width; of matrices without it, in their widest."""
        matrices = {
            name: part[bits if bits in part else max(part)].weight()
            for name, part in self.parts.items()
        }
        return self._fixed | matrices

    def stored(self, better: set[int]) -> dict[str, Linear | Tensor]:
        """Return all widths of the matrices, trained where that helped."""
        import numpy as np

        from paceline.models.tensors import Widths

        made: dict[str, Linear | Tensor] = dict(self._stored)
        for name, part in self.parts.items():
            widest = part[max(part)]
            exact = widest.exact
            forms = tuple(
                each.stored() if bits in better else each.start
                for bits, each in sorted(part.items())
            )
            losses = [_lost(exact, form) for form in forms]
            made[name] = Widths(forms, np.minimum.accumulate(np.array(losses, np.float32)))
        return made


def _in_bits(stored: Grouped, weight: Tensor, bits: int) -> Grouped:
    """Return a matrix in codes of a width: as it is stored, or rounded to nearest."""
    from paceline.compress.quantize.rtn import RoundToNearest
    from paceline.models.tensors import Grouped

    if bits == stored.bits:
        return stored
    symmetric = stored.zeros is None
    made = RoundToNearest(bits, stored.group, symmetric).compress(weight, Statistics())
    assert isinstance(made, Grouped)
    return made


def _schedule(widths: Sequence[int], layers: int, steps: int) -> Iterator[list[int]]:
    """Yield the width of each layer for every step: one after another, some layers in others."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        turn = widths[step % len(widths)]
        others = torch.rand(layers, generator=generator) < _OTHER
        drawn = torch.randint(len(widths), (layers,), generator=generator).tolist()
        yield [
            widths[at] if other else turn for at, other in zip(drawn, others.tolist(), strict=True)
        ]


def _weights(layers: Sequence[_Layer], bits: int) -> list[LayerWeights]:
    return [layer.weights(bits) for layer in layers]


def _lost(exact: Tensor, form: Linear) -> float:
    """Return the share of the squares of a matrix that a stored form misses."""
    import torch

    missed = (torch.from_numpy(form.dense()) - exact).square().double().sum()
    return float(missed / exact.square().double().sum().clamp(min=1e-300))

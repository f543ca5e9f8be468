"""LLM-QAT: train all codes of a model on its own texts, towards its own logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import MATRICES, ModelTuner
from paceline.compress.reconstruct.descent import Descent
from paceline.compress.reconstruct.distillation import (
    CompressedModel,
    Distillation,
    fixed_layer,
    rounded_inputs,
)
from paceline.compress.reconstruct.integers import trained_integers
from paceline.compress.reconstruct.norms import Norms
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.models.export.assembly import form_name
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.reconstruct.trainable import Trainable
    from paceline.models.blocks import LayerWeights
    from paceline.models.tensors import Linear


@tuners.register("llm_qat", Exactness.LOSSY)
@dataclass(frozen=True)
class LLMQAT(ModelTuner):
    """Train the integers of all blocks together, so that the logits stay those of the original.

    The original is the teacher: the loss is the divergence of its distributions, on texts that it
    wrote itself where `--calibration own` is given, so that no data is needed. Codes are rounded
    from trained positions, through which gradients pass; scales, zero points and norms are trained,
    too. Inputs of matrices are rounded at each position while it is trained, and so are keys and
    values; stored are weights alone, for engines that round such, e.g. with `act=int8`. One in
    eight texts is held out; where the divergence on those does not fall, all stays as it was.

    Original, codes, their gradients and Adam's moments are in memory: about 40 bytes a weight.

    Attributes:
        steps: of Adam, 1 to 100000. Default 64.
        rate: learning rate in codes, above 0 and up to 1; scales and norms move a tenth of it,
            relatively. Default 0.01.
        batch: texts of a step, 1 to 1024. Default 2.
        act_bits: of the inputs of matrices, 4 to 8, or 16, which rounds nothing. Default 8.
        kv_bits: of keys and values, 4 to 8, or 16, which rounds nothing. Default 8.
    """

    steps: int = 64
    rate: float = 0.01
    batch: int = 2
    act_bits: int = 8
    kv_bits: int = 8

    source = Source(
        authors="Liu et al.",
        title="LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
        arxiv="2305.17888",
        section="section 2",
        note="starts from the codes of any quantizer, in groups",
    )
    catalogue = (157,)
    examples = ("llm_qat:steps=8", "llm_qat:steps=8,act_bits=16,kv_bits=16")
    own_texts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)
        for name in ("act_bits", "kv_bits"):
            if getattr(self, name) not in (*range(4, 9), 16):
                raise MethodError(
                    f"{self.name}:{name} is {getattr(self, name)}, expected 4 to 8, or 16"
                )

    def tune(self, model: CompressedModel) -> list[dict[str, Linear | Tensor]]:
        """See `ModelTuner`."""
        layers = [_Layer(model, index, self.act_bits) for index in range(len(model.stored))]
        if not any(layer.parts for layer in layers):
            raise MethodError(
                f"{self.name} trains integers in groups, and the recipe stores {_forms(model)}"
            )
        distillation = Distillation(model, self.batch, self.kv_bits)
        before = distillation.error(_weights(layers))
        parameters = [pair for layer in layers for pair in layer.groups()]
        descent = Descent(parameters, self.steps, self.rate)
        for rows in distillation.split.batches(self.steps):
            descent.step(distillation.loss(_weights(layers), rows))
        tuned = [layer.stored() for layer in layers]
        after = distillation.error(
            [layer.products(fixed_layer(one)) for layer, one in zip(layers, tuned, strict=True)]
        )
        return tuned if after < before else [dict(each) for each in model.stored]


class _Layer:
    """One layer whose integers and norms are trained."""

    def __init__(self, model: CompressedModel, index: int, act_bits: int) -> None:
        from paceline.models.tensors import Linear

        self._stored, self._bits = model.stored[index], act_bits
        found = {
            name: trained_integers(model.latent(index, name), each)
            for name, each in self._stored.items()
            if isinstance(each, Linear)
        }
        self.parts: dict[str, Trainable] = {
            name: part for name, part in found.items() if part is not None
        }
        self._fixed = fixed_layer(
            {name: each for name, each in self._stored.items() if name not in self.parts}
        )
        self._norms = Norms(self._fixed, model.config.norm_offset)

    def groups(self) -> list[tuple[Tensor, float]]:
        parts = [pair for part in self.parts.values() for pair in part.groups()]
        return [*parts, *self._norms.groups()]

    def weights(self) -> LayerWeights:
        matrices = {name: part.weight() for name, part in self.parts.items()}
        return self.products(self._fixed | self._norms.weights() | matrices)

    def products(self, weights: Mapping[str, Tensor]) -> LayerWeights:
        return {
            name: rounded_inputs(each, self._bits) if name in MATRICES else each
            for name, each in weights.items()
        }

    def stored(self) -> dict[str, Linear | Tensor]:
        parts = {name: part.stored() for name, part in self.parts.items()}
        return {**self._stored, **self._norms.final(), **parts}


def _weights(layers: Sequence[_Layer]) -> list[LayerWeights]:
    return [layer.weights() for layer in layers]


def _forms(model: CompressedModel) -> str:
    from paceline.models.tensors import Linear

    names = {
        form_name(each)
        for layer in model.stored
        for each in layer.values()
        if isinstance(each, Linear)
    }
    return ", ".join(sorted(names)) or "all matrices as they were"

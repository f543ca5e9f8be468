"""EfficientLLM: prune a little, train a little, and so on until the share is gone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from paceline.compress.structure.base import KeptLayer, Structure
from paceline.compress.structure.llm_pruner import LLMPruner
from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner, unit_size
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

PARAMETERS = ("norms", "lora", "all")
_RATES = {"norms": 5e-3, "lora": 1e-3, "all": 1e-4}


@structures.register("efficient_llm", Exactness.LOSSY)
@dataclass(frozen=True)
class EfficientLLM(WidthPruner):
    """Remove the least salient channels and heads while training goes on.

    In each round the units with the smallest saliency for a weight, by second-order gradients, go
    from the whole model, and what is left is trained towards the original. So saliencies follow the
    training, and the widths of the layers fall out of them. An interrupted run goes on.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        rounds: of pruning and training, 1 to 1000; one is pruning before training. Default 4.
        tokens: that are trained on in all rounds together, 1 to 10^9. Default 32000.
        parameters: what is trained: norms, lora or all, as with `recover`. Default lora.
        rank: of the products of lora, 1 to 1024. Default 32.
        rate: of Adam at the beginning of each round, 0 to 1; 0 as with `recover`. Default 0.
        batch: texts of a step, 1 to 1024. Default 2.
        rows: texts that saliencies are computed on, 1 to 1000. Default 4.
    """

    rounds: int = 4
    tokens: int = 32_000
    parameters: str = "lora"
    rank: int = 32
    rate: float = 0.0
    batch: int = 2
    rows: int = 4

    source = Source(
        authors="Xing et al.",
        title="EfficientLLM: Scalable Pruning-Aware Pretraining for Architecture-Agnostic Edge "
        "Language Models",
        arxiv="2502.06663",
        section="section 3",
        note="distils from the original on the calibration texts",
    )
    catalogue = (390,)
    missing = {390: "pre-training on billions of tokens, which takes many GPUs"}
    examples = ("efficient_llm:multiple=4,rounds=2,tokens=200,rank=2,rows=2",)

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(1, 1000, self.name, rounds=self.rounds, rows=self.rows)
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1, 1024, self.name, rank=self.rank, batch=self.batch)
        check_range(0, 1, self.name, rate=self.rate)
        if self.parameters not in PARAMETERS:
            raise MethodError(
                f"{self.name}:parameters is {self.parameters!r}, expected {', '.join(PARAMETERS)}"
            )

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return the saliency of each unit for one of its weights."""
        summed = LLMPruner(order="second", rows=self.rows).scores(model, base, folder)
        made = []
        for index, layer in enumerate(summed):
            weights, shape = model.layer(index), model.config.layers[index]
            units = {
                name: each / unit_size(weights, shape, name) for name, each in layer.units.items()
            }
            made.append(LayerScores(units))
        return made

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        whole, current, errors = model.matrix_weights, model, []
        for number in range(self.rounds):
            wanted = (1 - self.share * (number + 1) / self.rounds) * whole
            share = 1 - wanted / current.matrix_weights
            if share >= 0.01:
                made = replace(self, share=share).cut(current, base, folder)
                current = current.with_layers(
                    (layer.shape, {**current.layer(layer.source), **layer.tensors})
                    for layer in made.layers
                )
            current, error = self._train(current, base, folder / f"round-{number}.safetensors")
            errors.append(error)
        layers = [
            KeptLayer(index, shape, current.layer(index))
            for index, shape in enumerate(current.config.layers)
        ]
        widths = [shape.intermediate for shape in current.config.layers]
        note = (
            f"{self.name} left {min(widths)} to {max(widths)} MLP channels in a layer; the "
            f"divergence from the original on held-out texts was {', '.join(errors)} nats a token "
            "after each round."
        )
        return Structure(layers, note)

    def _train(self, model: WholeModel, base: WholeModel, state: Path) -> tuple[WholeModel, str]:
        """Return a model after one round of training, and its divergence from the original."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

        generator = torch.Generator().manual_seed(0)
        before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
        layers = [TrainedLayer(each, self.parameters, self.rank, generator) for each in before]
        recovery = Recovery(model, base.in_memory, layers, self.batch)
        size = min(self.batch, len(recovery.split.trained)) * model.texts.shape[1]
        steps = max(1, round(self.tokens / self.rounds / size))
        old = recovery.error(before)
        recovery.train(steps, self.rate or _RATES[self.parameters], state)
        after = [one | layer.final() for one, layer in zip(before, layers, strict=True)]
        new = recovery.error(after)
        chosen = after if new < old else before
        trained = model.with_layers(zip(model.config.layers, chosen, strict=True))
        return trained, f"{min(old, new):.4f}"

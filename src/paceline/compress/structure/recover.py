"""Recovery: a model that lost parts learns the distributions of the model that it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paceline.compress.structure.base import Distilled, Structure, trained_model
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.registry import Source, structures


@structures.register("recover", Exactness.LOSSY)
@dataclass(frozen=True)
class Recover(Distilled):
    """Train what is left of a model towards the model that it was, on texts without labels.

    The loss is the divergence of its distributions from those of the original, on the calibration
    texts or, with `--calibration own`, on what the original writes. One in eight texts is held out;
    where the divergence on those does not fall, all stays as it was. Products of low rank are
    merged into their matrices in the end. An interrupted training goes on where it was.

    Attributes:
        tokens: that are trained on, 1 to 10^9; texts come again where there are fewer. Default
            32000.
        parameters: what is trained: norms, with biases (PERP); lora, these and a product of low
            rank for each matrix; or all. Default lora.
        rank: of the products, 1 to 1024. Default 32.
        rate: of Adam at the beginning, 0 to 1; it falls to zero by a cosine. 0, the default, is
            0.005 for norms, 0.001 for lora and 0.0001 for all.
        batch: texts of a step, 1 to 1024. Default 2.
        dtype: of the products in blocks, fp32 or bf16, which is twice as fast on processors that
            multiply it; what is trained stays float32. Default fp32.
    """

    rates: ClassVar = {"norms": 5e-3, "lora": 1e-3, "all": 1e-4}
    source = Source(
        authors="Zimmer et al.",
        title="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        arxiv="2312.15230",
        section="section 3",
        note="for missing parts: zeros of a pruner are not kept; distils from the original",
    )
    catalogue = (393,)
    examples = ("recover:tokens=400,rank=2", "recover:tokens=400,parameters=norms")

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        from paceline.compress.reconstruct.recovery import Recovery

        before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
        layers = self.trained_layers(before)
        recovery = Recovery(model, base.in_memory, layers, self.batch, self.half)
        old = recovery.error(before)
        tokens = self.train(recovery, folder)
        tuned = [layer.final() for layer in layers]
        new = recovery.error([one | two for one, two in zip(before, tuned, strict=True)])
        better = new < old
        words = f"went from {old:.4f} to {new:.4f} nats a token"
        if not better:
            words = f"stayed at {old:.4f} nats a token, and all is as it was"
        note = (
            f"{self.name} trained {self.parameters} on {tokens} tokens: the divergence from "
            f"the original on held-out texts {words}."
        )
        return Structure(trained_model(model, tuned, better), note)

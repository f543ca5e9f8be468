"""Recovery: a model that lost parts learns the distributions of the model that it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

PARAMETERS = ("norms", "lora", "all")
DTYPES = ("fp32", "bf16")
_RATES = {"norms": 5e-3, "lora": 1e-3, "all": 1e-4}


@structures.register("recover", Exactness.LOSSY)
@dataclass(frozen=True)
class Recover(StructureMethod):
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

    tokens: int = 32_000
    parameters: str = "lora"
    rank: int = 32
    rate: float = 0.0
    batch: int = 2
    dtype: str = "fp32"

    source = Source(
        authors="Zimmer et al.",
        title="PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        arxiv="2312.15230",
        section="section 3",
        note="for missing parts: zeros of a pruner are not kept; distils from the original",
    )
    catalogue = (393,)
    examples = ("recover:tokens=400,rank=2", "recover:tokens=400,parameters=norms")

    def __post_init__(self) -> None:
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1, 1024, self.name, rank=self.rank, batch=self.batch)
        check_range(0, 1, self.name, rate=self.rate)
        if self.dtype not in DTYPES:
            raise MethodError(f"{self.name}:dtype is {self.dtype!r}, expected fp32 or bf16")
        if self.parameters not in PARAMETERS:
            raise MethodError(
                f"{self.name}:parameters is {self.parameters!r}, expected {', '.join(PARAMETERS)}"
            )

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

        generator = torch.Generator().manual_seed(0)
        before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
        layers = [TrainedLayer(each, self.parameters, self.rank, generator) for each in before]
        recovery = Recovery(model, base.in_memory, layers, self.batch, self.dtype == "bf16")
        size = min(self.batch, len(recovery.split.trained)) * model.texts.shape[1]
        steps = max(1, round(self.tokens / size))
        old = recovery.error(before)
        recovery.train(steps, self.rate or _RATES[self.parameters], folder / "training.safetensors")
        tuned = [layer.final() for layer in layers]
        new = recovery.error([one | two for one, two in zip(before, tuned, strict=True)])
        better = new < old
        shapes = model.config.layers
        kept = [
            KeptLayer(index, shape, tuned[index] if better else {})
            for index, shape in enumerate(shapes)
        ]
        words = f"went from {old:.4f} to {new:.4f} nats a token"
        if not better:
            words = f"stayed at {old:.4f} nats a token, and all is as it was"
        note = (
            f"{self.name} trained {self.parameters} on {steps * size} tokens: the divergence from "
            f"the original on held-out texts {words}."
        )
        return Structure(kept, note)

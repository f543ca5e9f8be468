"""Temp-LoRA: learn a document part by part in products of low rank, which are merged in the end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures


@structures.register("temp_lora", Exactness.LOSSY)
@dataclass(frozen=True)
class TempLora(StructureMethod):
    """Train products of low rank, and norms, on the tokens of a document, one part after another.

    The parts are the calibration texts in their order (`--calibration book.txt`). Each is judged
    before it is trained on, with what those before it taught and without; the card has both losses,
    and where the first is no smaller, all stays as it was. What was learnt is merged into the
    matrices: the model continues this document, and others like it, and is to be thrown away after.

    Attributes:
        passes: steps on each part, 1 to 1000. Default 2.
        rank: of the products, 1 to 1024. Default 32.
        rate: of Adam at the first part, up to 1; it falls to zero by a cosine. Default 0.0005.
    """

    passes: int = 2
    rank: int = 32
    rate: float = 5e-4

    source = Source(
        authors="Wang et al.",
        title="With Greater Text Comes Greater Necessity: Inference-Time Training Helps Long Text "
        "Generation",
        arxiv="2401.11504",
        section="section 2.2, algorithm 1",
        note="trains norms, too, at a rate that falls",
    )
    catalogue = (182,)
    missing = {182: "training on what is being generated, with the context cut to a window"}
    examples = ("temp_lora:rank=2",)

    def __post_init__(self) -> None:
        check_range(1, 1000, self.name, passes=self.passes)
        check_range(1, 1024, self.name, rank=self.rank)
        check_range(1e-9, 1.0, self.name, rate=self.rate)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: there is one part, which leaves none to judge by.
        """
        import torch

        from paceline.compress.reconstruct.descent import Descent
        from paceline.compress.reconstruct.document import DocumentTraining
        from paceline.compress.reconstruct.recovery import TrainedLayer

        count, length = model.texts.shape
        if count < 2:
            raise MethodError(
                f"{self.name} learns from parts of a text and judges by the next, and there is one "
                "part; give --rows 2 or more"
            )
        generator = torch.Generator().manual_seed(0)
        before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
        layers = [TrainedLayer(each, "lora", self.rank, generator) for each in before]
        training = DocumentTraining(model, model, layers, batch=1)
        descent = Descent(training.parameters(), count * self.passes, self.rate)
        plain = learnt = 0.0
        for place in range(count):
            row = torch.tensor([place])
            if place:  # the first part has none before it
                plain += training.loss(row, before) / (count - 1)
                learnt += training.loss(row, training.trained_weights()) / (count - 1)
            for _ in range(self.passes):
                descent.step_by(partial(training.backwards, row))
        better = learnt < plain
        end = "" if better else ", so that all stays as it was"
        note = (
            f"{self.name} learnt {count} parts of {length} tokens in order: before it was trained "
            f"on, each from the second on took {learnt:.4f} nats a token, and {plain:.4f} without "
            f"what the parts before it taught{end}."
        )
        return Structure(
            [
                KeptLayer(index, shape, layers[index].final() if better else {})
                for index, shape in enumerate(model.config.layers)
            ],
            note,
        )

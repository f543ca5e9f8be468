"""Sorted fine-tuning: one model whose first layers are models, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paceline.compress.structure.base import Distilled, Structure, trained_model
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, structures


@structures.register("sorted", Exactness.LOSSY)
@dataclass(frozen=True)
class Sorted(Distilled):
    """Train a model so that its first layers, with its norm and head, predict what all of them do.

    The loss is the sum over depths, that of the whole model included, of the divergence from the
    distributions of the original. No layer goes: the drafter `layer_skip:skip=LAYERS` drafts with
    the first ones, which the whole model verifies, and `layer_drop:count=10,by=last` makes a
    smaller model of them. One in eight texts is held out; where the sum does not fall on those, all
    stays as it was.

    Attributes:
        depths: numbers of first layers, with + between them. Default: a half and three quarters of
            the layers.
        tokens: that are trained on, 1 to 10^9; texts come again where there are fewer. Default
            32000.
        parameters: lora, products of low rank for each matrix, norms and biases; or all. Default
            lora.
        rank: of the products, 1 to 1024. Default 32.
        rate: of Adam at the beginning, 0 to 1; it falls to zero by a cosine. 0, the default, is
            0.001 for lora and 0.0001 for all.
        batch: texts of a step, 1 to 1024. Default 2.
        dtype: as of `recover`.
    """

    depths: str = ""

    rates: ClassVar = {"lora": 1e-3, "all": 1e-4}
    source = Source(
        authors="Kavehzadeh et al.",
        title="Sorted LLaMA: Unlocking the Potential of Intermediate Layers of Large Language "
        "Models for Dynamic Inference Using Sorted Fine-Tuning (SoFT)",
        arxiv="2309.08968",
        section="section 3",
        note="distils from the original instead of fine-tuning on a task",
    )
    catalogue = (139,)
    missing = {139: "the depth chosen for each request by its latency"}
    examples = ("sorted:depths=1,tokens=400,rank=2",)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: the model has no such depths.
        """
        from paceline.compress.reconstruct.nested import NestedRecovery

        count = len(model.config.layers)
        depths = [*self._depths(count), count]
        before = [dict(model.layer(index)) for index in range(count)]
        layers = self.trained_layers(before)
        training = NestedRecovery(
            model, base.in_memory, layers, self.batch, self.half, depths=depths
        )
        old = training.errors(before)
        tokens = self.train(training, folder)
        tuned = [layer.final() for layer in layers]
        new = training.errors([one | two for one, two in zip(before, tuned, strict=True)])
        better = sum(new) < sum(old)
        said = ", ".join(
            f"{depth} layers: {one:.4f} to {two:.4f}"
            for depth, one, two in zip(depths, old, new, strict=True)
        )
        note = (
            f"{self.name} trained {self.parameters} on {tokens} tokens; the divergence from "
            f"the original on held-out texts, in nats a token, went with {said}"
            f"{'' if better else ', which is no better in sum, so that all stays as it was'}."
        )
        return Structure(trained_model(model, tuned, better), note)

    def _depths(self, count: int) -> list[int]:
        """Return the depths that are trained beside the whole model, increasing."""
        if not self.depths:
            return sorted({depth for depth in (count // 2, count * 3 // 4) if 0 < depth < count})
        words = self.depths.split("+")
        right = all(word.isascii() and word.isdecimal() and 0 < int(word) < count for word in words)
        if not right:
            raise MethodError(
                f"{self.name}:depths is {self.depths!r}, expected numbers from 1 to {count - 1} "
                "with + between them"
            )
        return sorted(set(map(int, words)))

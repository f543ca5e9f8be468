"""Training that brings a model with missing parts back towards the model that it was."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import numpy as np

from paceline.compress.base import MATRICES
from paceline.compress.reconstruct.descent import Descent
from paceline.compress.reconstruct.split import TextSplit
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import write_arrays

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.whole_model import WholeModel
    from paceline.models.blocks import LayerWeights

HEADED = 64  # positions whose logits are in memory at once, so that caches hold them
_KEPT = 30.0  # seconds between two states that an interrupted training goes on from


class TunedLayer(Protocol):
    """A layer of which a part is trained."""

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate."""

    def weights(self) -> LayerWeights:
        """Return what a block multiplies with, differentiable."""


class TrainedLayer:
    """A layer of which a part is trained.

    Args:
        weights: float32 tensors of the layer.
        parameters: `norms`: vectors alone; `lora`: these, and for each matrix a product of rank
            `rank` that is added to it; `all`: everything.
        rank: of the products.
        generator: of their first values.
        masked: matrices to which a product is added where they are not zero.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        parameters: str,
        rank: int,
        generator: object,
        masked: Collection[str] = (),
    ) -> None:
        import torch

        self._fixed = dict(weights)
        self._masks = {name: (weights[name] != 0).float() for name in masked}
        self.trained: dict[str, Tensor] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name, each in weights.items():
            if name not in MATRICES or parameters == "all":
                self.trained[name] = each.clone().requires_grad_()
            elif parameters == "lora" or name in masked:
                down = torch.randn(rank, each.shape[1], generator=generator)  # type: ignore[call-overload]
                down = down / each.shape[1] ** 0.5
                up = torch.zeros(each.shape[0], rank)
                self._pairs[name] = (down.requires_grad_(), up.requires_grad_())

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate."""
        pairs = [(each, 1.0) for pair in self._pairs.values() for each in pair]
        return [*((each, 1.0) for each in self.trained.values()), *pairs]

    def weights(self) -> LayerWeights:
        """Return what a block multiplies with, differentiable."""
        from torch.nn import functional as F

        def product(name: str) -> object:
            matrix, (down, up) = self._fixed[name], self._pairs[name]
            return lambda x: F.linear(x, matrix) + F.linear(F.linear(x, down), up)

        products = {name: product(name) for name in self._pairs if name not in self._masks}
        return {**self._fixed, **self.trained, **products, **self._merged(self._masks)}  # type: ignore[dict-item]

    def final(self) -> dict[str, Tensor]:
        """Return the tensors that training changed; products are added to their matrices."""
        merged = self._merged(self._pairs)
        return {name: each.detach() for name, each in {**self.trained, **merged}.items()}

    def _merged(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return matrices with their products; zeros of a pruner stay."""
        merged = {}
        for name in names:
            down, up = self._pairs[name]
            product = up @ down
            mask = self._masks.get(name)
            merged[name] = self._fixed[name] + (product if mask is None else mask * product)
        return merged


@dataclass
class Recovery:
    """The distillation of a model from the one that it was made of.

    The loss is the divergence of its distributions from those of the teacher, mean over positions.

    Attributes:
        student: the model that is trained.
        teacher: the model that it was.
        layers: of the student, with what is trained.
        batch: texts of a step.
        half: whether blocks multiply in bfloat16; parameters and the head stay float32.
        seed: of the order of the texts.
    """

    student: WholeModel
    teacher: WholeModel
    layers: Sequence[TunedLayer]
    batch: int
    half: bool = False
    seed: int = 0
    split: TextSplit = field(init=False)

    def __post_init__(self) -> None:
        texts = self.student.texts
        self.split = TextSplit(len(texts), texts.shape[1], self.batch, self.seed)

    def train(self, steps: int, rate: float, state: Path | None) -> None:
        """Train, or go on from the state that an interrupted run kept.

        Args:
            steps: of Adam, whose rate falls to zero by a cosine.
            rate: at the beginning.
            state: the file where the state is kept twice a minute; None keeps none.
        """
        descent = Descent(self.parameters(), steps, rate)
        done = 0 if state is None else self._restore(descent, state)
        kept = monotonic()
        for step, rows in enumerate(self.split.batches(steps)):
            if step < done:
                continue
            descent.step_by(partial(self._backwards, rows))
            if state is not None and monotonic() - kept > _KEPT:
                self._keep(descent, step + 1, state)
                kept = monotonic()
        if state is not None:
            self._keep(descent, steps, state)

    def error(self, weights: Sequence[LayerWeights]) -> float:
        """Return the divergence of a student on the texts that are held out, in nats per token."""
        import torch

        total = 0.0
        with torch.no_grad():
            for rows in torch.split(self.split.held, self.batch):
                texts = self.student.texts[rows]
                right, x = self._teach(texts), self._states(texts, weights)
                right, x = (each[:, self.split.held_positions] for each in (right, x))
                total += self._divergence(right, x) * len(rows)
        return total / len(self.split.held)

    def trained_weights(self) -> list[LayerWeights]:
        """Return the weights of all layers, differentiable."""
        return [layer.weights() for layer in self.layers]

    def parameters(self) -> list[tuple[Tensor, float]]:
        """Return what is trained, with factors of the rate."""
        return [pair for layer in self.layers for pair in layer.groups()]

    def _backwards(self, rows: Tensor) -> float:
        """Add the gradients of the loss on some texts; return it."""
        import torch

        texts = self.student.texts[rows]
        with torch.no_grad():
            right = self._teach(texts)[:, self.split.trained_positions]
        with torch.enable_grad():
            states = self._states(texts, self.trained_weights())
            states = states[:, self.split.trained_positions]
            ends = states.detach().requires_grad_()
            loss = self._divergence(right, ends, learn=True)
            assert ends.grad is not None
            torch.autograd.backward(states, ends.grad)
        return loss

    def _divergence(self, right: Tensor, x: Tensor, learn: bool = False) -> float:
        """Return the divergence of the last blocks' outputs; add gradients if asked."""
        import torch

        total, count = 0.0, x.shape[0] * x.shape[1]
        one, other = right.flatten(0, 1), x.flatten(0, 1)
        for start in range(0, count, HEADED):
            part = slice(start, start + HEADED)
            with torch.no_grad():
                wanted = self.teacher.log_probs(one[part])
                shares = wanted.exp()
            logits = self.student.logits(other[part])
            with torch.no_grad():
                ours = logits.log_softmax(-1)
                total += float((shares * wanted.sub_(ours)).sum()) / count
            if learn:
                torch.autograd.backward(logits, ours.exp_().sub_(shares).div_(count))
        return total

    def _teach(self, texts: Tensor) -> Tensor:
        """Return the last block's outputs of the teacher."""
        import torch

        x = self.teacher.embed(texts)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            for index in range(len(self.teacher.config.layers)):
                x = self.teacher.run(index, x)
        return x

    def _states(self, texts: Tensor, weights: Sequence[LayerWeights]) -> Tensor:
        """Return the last block's outputs of the student."""
        import torch

        from paceline.compress.whole_model import run_block

        x = self.student.embed(texts)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            for shape, each in zip(self.student.config.layers, weights, strict=True):
                x = run_block(self.student.config, shape, each, x)
        return x

    def _keep(self, descent: Descent, done: int, file: Path) -> None:
        arrays = {
            name: ("F32", np.ascontiguousarray(each.detach().numpy()))
            for name, each in descent.state().items()
        }
        write_arrays(file, {**arrays, "done": ("I64", np.array([done], np.int64))})

    def _restore(self, descent: Descent, file: Path) -> int:
        """Put a kept state back; return how many steps it has."""
        import torch

        if not file.is_file():
            return 0
        arrays = {name: np.array(each.values) for name, each in read_file(file).items()}
        done = int(arrays.pop("done")[0])
        descent.restore({name: torch.from_numpy(each) for name, each in arrays.items()}, done)
        return done

"""PST: train which weights stay, by a score of few parameters, and the weights with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import ModelTuner
from paceline.compress.reconstruct.distillation import CompressedModel, fixed_layer
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights
    from paceline.models.tensors import Linear, Sparse


@tuners.register("pst", Exactness.LOSSY)
@dataclass(frozen=True)
class PST(ModelTuner):
    """Train the masks of pruned matrices and a product of low rank for each, together.

    A weight's score is its absolute value plus what is trained: a product of low rank, a number for
    each row and one for each column. As many of the highest scores as the pruner left stay, row by
    row; gradients pass through the choice to the scores. The weights that stay are those of the
    original plus the second product, which is merged in the end. Patterns N:M are kept. The loss is
    the divergence from the original on the calibration texts; where it does not fall on those that
    are held out, all stays as it was.

    Attributes:
        steps: of Adam, 1 to 100000. Default 48.
        rank: of both products, 1 to 1024. Default 8.
        rate: of Adam at the beginning, above 0 and up to 1. Default 0.002.
        score_rate: of the scores, in units of the mean absolute weight, above 0 and up to 10.
            Default 0.05.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    steps: int = 48
    rank: int = 8
    rate: float = 2e-3
    score_rate: float = 0.05
    batch: int = 2

    source = Source(
        authors="Li et al.",
        title="Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
        arxiv="2205.11005",
        section="section 3",
        note="starts from the shares of any pruner; distils from the original",
    )
    catalogue = (63,)
    examples = ("pst:steps=4,rank=2",)
    keeps_codes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1, 1024, self.name, rank=self.rank, batch=self.batch)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1e-9, 10.0, self.name, score_rate=self.score_rate)

    def tune(self, model: CompressedModel) -> list[dict[str, Linear | Tensor]]:
        """See `ModelTuner`."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery

        generator = torch.Generator().manual_seed(0)
        layers = [_ScoredLayer(self, model, index, generator) for index in range(len(model.stored))]
        if not any(layer.matrices for layer in layers):
            raise MethodError(
                f"{self.name} trains the masks of pruned matrices, and the recipe stores none; put "
                "a pruner before it, without a quantizer"
            )
        before = [fixed_layer(each) for each in model.stored]
        teacher = WholeModel(
            model.config, lambda index: model.layers[index], model.outer, model.texts
        )
        student = teacher.with_layers(zip(model.config.layers, before, strict=True))
        recovery = Recovery(student, teacher, layers, self.batch)
        old = recovery.error(before)
        state = None if model.folder is None else model.folder / "pst.safetensors"
        recovery.train(self.steps, self.rate, state)
        tuned = [layer.stored() for layer in layers]
        made = [{**one, **two} for one, two in zip(model.stored, tuned, strict=True)]
        if not recovery.error([fixed_layer(each) for each in made]) < old:
            return [dict(each) for each in model.stored]
        return made


class _ScoredLayer:
    """A layer whose pruned matrices have trained masks.

    Args:
        method: with the settings.
        model: that is trained.
        index: of the layer.
        generator: of the first values of products.
    """

    def __init__(self, method: PST, model: CompressedModel, index: int, generator: object) -> None:
        from paceline.models.tensors import Sparse

        self._fixed = fixed_layer(model.stored[index])
        self.matrices = {
            name: _ScoredMatrix(each, model.latent(index, name), method, generator)
            for name, each in model.stored[index].items()
            if isinstance(each, Sparse)
        }

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate."""
        return [pair for matrix in self.matrices.values() for pair in matrix.groups()]

    def weights(self) -> LayerWeights:
        """Return what a block multiplies with, differentiable."""
        return self._fixed | {name: each.weight() for name, each in self.matrices.items()}

    def stored(self) -> dict[str, Linear]:
        """Return the matrices as they are stored."""
        return {name: each.stored() for name, each in self.matrices.items()}


class _ScoredMatrix:
    """A matrix [out, in] with a trained mask.

    Args:
        stored: as a pruner left it; each row keeps as many weights.
        weight: float32 [out, in], as it was.
        method: with the settings.
        generator: of the first values of the products.
    """

    def __init__(self, stored: Sparse, weight: Tensor, method: PST, generator: object) -> None:
        import torch

        def parameter(*shape: int) -> Tensor:
            return torch.zeros(shape).requires_grad_()

        def drawn(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)  # type: ignore[call-overload]
            return (values / shape[-1] ** 0.5).requires_grad_()  # type: ignore[no-any-return]

        self._stored, self._weight = stored, weight
        self._magnitude = weight.abs() / weight.abs().mean().clamp(min=1e-30)
        self._kept = torch.from_numpy(stored.mask.sum(1))
        rows, columns = weight.shape
        self._score = (drawn(method.rank, columns), parameter(rows, method.rank))
        self._rows, self._columns = parameter(rows, 1), parameter(columns)
        self._change = (drawn(method.rank, columns), parameter(rows, method.rank))
        self._factor = method.score_rate / method.rate

    def groups(self) -> list[tuple[Tensor, float]]:
        scores = [*self._score, self._rows, self._columns]
        return [*((each, self._factor) for each in scores), *((each, 1.0) for each in self._change)]

    def weight(self) -> Tensor:
        """Return the masked matrix; gradients of the mask go to its scores as they are."""
        scores = self._scores()
        mask = self._mask(scores.detach()).float() + scores - scores.detach()
        return mask * self._dense()

    def stored(self) -> Sparse:
        import numpy as np

        mask = self._mask(self._scores().detach()).numpy()
        values = np.ascontiguousarray(self._dense().detach().numpy()[mask])
        return replace(self._stored, mask=mask, values=values, dtype="F32")

    def _dense(self) -> Tensor:
        down, up = self._change
        return self._weight + up @ down

    def _scores(self) -> Tensor:
        down, up = self._score
        return self._magnitude + up @ down + self._rows + self._columns

    def _mask(self, scores: Tensor) -> Tensor:
        """Return which weights stay: as many of each row, or of each group, as before."""
        kept, width = self._kept[:, None, None], scores.shape[1]
        if self._stored.pattern is not None:
            kept, width = kept.new_tensor(self._stored.pattern[0]), self._stored.pattern[1]
        groups = scores.view(len(scores), -1, width)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        mask: Tensor = (order.argsort(dim=-1) < kept).view_as(scores)
        return mask

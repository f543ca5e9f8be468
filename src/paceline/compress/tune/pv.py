"""PV-Tuning: train scales and codebooks, and move the few codes that the loss asks for most."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics
from paceline.compress.reconstruct.codes import MovableCodes, choose_moves, movable
from paceline.compress.reconstruct.descent import Descent
from paceline.compress.reconstruct.objective import Objective
from paceline.compress.reconstruct.trainable import TrainedBlock
from paceline.compress.tune.base import Tuner
from paceline.core import Exactness
from paceline.registry import Source, check_range, tuners

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_ATTEMPTS = 3  # subsets of rows that are tried, each a third of the one before


@tuners.register("pv", Exactness.LOSSY)
@dataclass(frozen=True)
class PVTuning(Tuner):
    """Alternate between training continuous numbers and moving codes, without straight-through.

    The gradients of the matrices themselves are gathered over some steps of training scales,
    codebooks and norms; then a few codes of each row are moved, those whose moves promise most by
    gradient and curvature. Where the error on the last texts does not fall, a third of the rows is
    moved, then a ninth, then none.

    Attributes:
        steps: as of every tuner.
        rate: learning rate, above 0 and up to 1; scales, entries and norms move a tenth of it,
            relatively. Default 0.1.
        batch: as of every tuner.
        every: steps between moves of codes, 1 to 1000. Default 3.
        share: of the codes of a row that move at once, at most, above 0 and up to 1. Default 0.01.
    """

    rate: float = 0.1
    every: int = 3
    share: float = 0.01

    source = Source(
        authors="Malinovskii et al.",
        title="PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression",
        arxiv="2405.14852",
        section="algorithm 1, section 3.3 (subspace of codes)",
        note="on a block's outputs; moves are checked, and fewer are made where they fail",
    )
    catalogue = (416,)
    examples = ("pv:steps=8", "pv:steps=8,every=4,share=0.02")

    statistics = frozenset({Statistic.SECOND_MOMENT})
    through_transforms = False
    trains = "integers in groups and codebooks"

    def __post_init__(self) -> None:
        Tuner.__post_init__(self)
        check_range(1, 1000, self.name, every=self.every)
        check_range(1e-9, 1.0, self.name, share=self.share)

    def trainable(self, weight: Tensor, stored: Linear) -> MovableCodes | None:
        """Return the codes of integers in groups or of a codebook."""
        return movable(stored)

    def fit(self, trained: TrainedBlock, objective: Objective) -> None:
        """Alternate steps of continuous numbers, by Adam, and moves of codes."""
        codes = {k: each for k, each in trained.parts.items() if isinstance(each, MovableCodes)}
        sums: dict[str, Tensor] = {}
        rows_of = self._sensitivities(trained, objective, codes)
        descent = Descent(trained.groups(), self.steps, self.rate)
        for step, texts in enumerate(objective.batches(self.steps), 1):
            weights = trained.weights()
            for name in codes:
                weights[name].retain_grad()
            descent.step(objective.loss(weights, texts))
            for name in codes:
                gradient = weights[name].grad
                assert gradient is not None
                sums[name] = gradient / self.every + sums.get(name, 0)
            if step % self.every == 0:
                moves = {}
                for name, each in codes.items():
                    turn = step // self.every % each.codes.shape[2]
                    moment = _moment(trained.block.stats[name])
                    moves[name] = self._moves(each, sums[name], rows_of[name], moment, turn)
                _move(codes, moves, partial(_loss, trained, objective, texts))
                sums = {}

    def _sensitivities(
        self, trained: TrainedBlock, objective: Objective, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Return how much a change of each output of the matrices bends the loss, float32 [out]."""
        import torch

        weights = trained.weights()
        matrices = [weights[name] for name in names]
        texts = next(iter(objective.batches(1)))
        gradients = torch.autograd.grad(objective.probe(weights, texts), matrices)
        return {
            name: each.square().sum(1) / _moment(trained.block.stats[name]).trace().clamp(min=1e-12)
            for name, each in zip(names, gradients, strict=True)
        }

    def _moves(
        self, codes: MovableCodes, gradient: Tensor, rows: Tensor, moment: Tensor, table: int
    ) -> tuple[Tensor, Tensor]:
        """Return all codes of a matrix after their best moves, and which of these to make."""
        curvature = rows[:, None] * moment.diagonal()
        moved, change = codes.propose(gradient, curvature, table)
        vectors = moved.shape[1]
        count = max(1, round(self.share * vectors))
        return moved, choose_moves(change, gradient, rows, moment, vectors, count)


def _move(
    codes: Mapping[str, MovableCodes],
    moves: Mapping[str, tuple[Tensor, Tensor]],
    loss: Callable[[], float],
) -> None:
    """Make moves in every row, in fewer rows where the loss does not fall, or none."""
    import torch

    start = {name: each.codes for name, each in codes.items()}
    before, every = loss(), 1
    for _ in range(_ATTEMPTS):
        for name, each in codes.items():
            moved, chosen = moves[name]
            some = torch.arange(len(chosen))[:, None] % every == 0
            each.codes = torch.where((chosen & some)[..., None], moved, start[name])
        if loss() < before:
            return
        every *= 3
    for name, each in codes.items():
        each.codes = start[name]


def _moment(stats: Statistics) -> Tensor:
    """Return the mean of x x' of the inputs of a matrix."""
    assert stats.second_moment is not None
    return stats.second_moment / max(stats.count, 1)


def _loss(trained: TrainedBlock, objective: Objective, texts: Tensor) -> float:
    import torch

    with torch.no_grad():
        return float(objective.loss(trained.weights(), texts))

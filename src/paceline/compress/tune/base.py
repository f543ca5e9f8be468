"""The contract of tuners, and their training: gradient descent on the outputs of one block."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Block, BlockTuner
from paceline.compress.reconstruct.objective import Objective, dense_weights, train
from paceline.compress.reconstruct.trainable import Trainable, TrainedBlock, TransformedPart
from paceline.errors import MethodError
from paceline.models.export.assembly import form_name
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear


@dataclass(frozen=True)
class Tuner(BlockTuner):
    """Trains the stored matrices of a block together, by Adam on the error of its outputs.

    The rate falls to zero by a cosine. One in eight texts is not trained on; where the error on
    those does not fall, the matrices stay as they were.

    Attributes:
        steps: of Adam for each block, 1 to 100000. Default 48.
        rate: learning rate, above 0 and up to 1. Default 0.015.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    steps: int = 48
    rate: float = 0.015
    batch: int = 2

    through_transforms: ClassVar[bool] = True  # trains matrices whose inputs are transformed

    def __post_init__(self) -> None:
        check_range(1, 100_000, self.name, steps=self.steps)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    @abstractmethod
    def trainable(self, weight: Tensor, stored: Linear) -> Trainable | None:
        """Return what is trained of a matrix, float32 [out, in]; None where it stays as it is."""

    @property
    @abstractmethod
    def trains(self) -> str:
        """Name the stored forms that it trains, for a message."""

    def tune(self, block: Block, stored: Mapping[str, Linear]) -> dict[str, Linear]:
        """See `BlockTuner`."""
        if not stored:  # all matrices of the block are kept
            return {}
        parts = self.parts(block, stored)
        objective = Objective(block, self.batch)
        before = objective.error(dense_weights(block, stored))
        trained = TrainedBlock(block, stored, parts)
        self.fit(trained, objective)
        tuned = dict(stored) | {name: part.stored() for name, part in parts.items()}
        norms = trained.norms.final()
        if not objective.error(dense_weights(block, tuned) | norms) < before:
            return dict(stored)
        block.weights.update(norms)
        return tuned

    def fit(self, trained: TrainedBlock, objective: Objective) -> None:
        """Train the parameters of a block, in place."""
        train(objective, trained.weights, trained.groups(), self.steps, self.rate)

    def parts(self, block: Block, stored: Mapping[str, Linear]) -> dict[str, Trainable]:
        """Return what is trained of each matrix.

        Raises:
            MethodError: nothing.
        """
        found = {name: self._part(block, name, each) for name, each in stored.items()}
        parts = {name: part for name, part in found.items() if part is not None}
        if not parts:
            forms = ", ".join(sorted({form_name(each) for each in stored.values()}))
            raise MethodError(f"{self.name} trains {self.trains}, and the recipe stores {forms}")
        return parts

    def _part(self, block: Block, name: str, stored: Linear) -> Trainable | None:
        from paceline.models.tensors import Transformed

        weight = block.weights[name]
        if not isinstance(stored, Transformed) or not self.through_transforms:
            return self.trainable(weight, stored)
        basis = block.bases[name]
        part = self.trainable(basis.into(weight), stored.matrix)
        return None if part is None else TransformedPart(part, basis)

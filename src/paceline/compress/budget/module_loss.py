"""How far a model whose modules have chosen levels is from its source, on a few texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from paceline.compress.budget.level_loss import LevelLoss
from paceline.compress.budget.module_levels import Level, shape_with
from paceline.compress.whole_model import WholeModel


class ModuleLoss(LevelLoss):
    """The divergence of models with other shapes and weights from their source.

    Args:
        source: the model as it was, and the texts.
        tensors: returns the tensors of a module at a level, by layer and name.
        names: layer and name of each module of an allocation.
        levels: returns the levels of a module, which numbers of an allocation choose from.
    """

    def __init__(
        self,
        source: WholeModel,
        tensors: Callable[[int, str, Level], dict[str, Tensor]],
        names: list[tuple[int, str]],
        levels: Callable[[int, str], Sequence[Level]],
    ) -> None:
        self._tensors, self._levels_of = tensors, levels
        super().__init__(source, _no_matrix, names)

    def _load(self, index: int, name: str, level: int) -> None:
        chosen = self._levels_of(index, name)[level]
        self._weights[index] |= self._tensors(index, name, chosen)
        own = shape_with(self.source.config.layers[index], name, chosen.units)
        if name == "o":
            self._shapes[index] = replace(
                self._shapes[index], heads=own.heads, kv_heads=own.kv_heads
            )
        else:
            self._shapes[index] = replace(self._shapes[index], intermediate=own.intermediate)


def _no_matrix(index: int, name: str, level: int) -> Tensor:
    raise NotImplementedError("modules are loaded whole")

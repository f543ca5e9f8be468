"""COMP: whole layers first, then neurons of the others, whose masks are fitted in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.base import Structure
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner, parts_of, per_unit
from paceline.compress.structure.widths.removal import damped
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor


@structures.register("comp", Exactness.LOSSY)
@dataclass(frozen=True)
class COMP(WidthPruner):
    """Remove a few whole layers, then channels and groups of heads, and fit those that stay.

    Layers go whose outputs are most similar to their inputs. The importance of an input of `down`
    or `o` is what the condition number of the matrix lets its absence change of the output at
    most: that number times the share of the inputs' norm that it has. Those that stay are scaled by
    a mask that minimises the squared error of the output on the calibration texts, and that is
    merged into the matrix.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: widths of MLPs are rounded to multiples of it, 1 to 1024. Default 32.
        layers: that are removed first, 0 to 1000. Default 2.
    """

    layers: int = 2

    source = Source(
        authors="Xu et al.",
        title="Lightweight and Post-Training Structured Pruning for On-Device Large Lanaguage "
        "Models",
        arxiv="2501.15255",
        section="abstract",
        note="the importance is written from the abstract: condition number times relative norm",
    )
    catalogue = (165,)
    missing = {165: "the paper's own formula of the importance, which its abstract does not give"}
    examples = ("comp:multiple=4,layers=0", "comp:share=0.4,multiple=8,layers=1")

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(0, 1000, self.name, layers=self.layers)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        count = len(model.config.layers)
        if self.layers >= count:
            raise MethodError(
                f"{self.name}:layers is {self.layers}, expected fewer than the {count} layers of "
                "this model"
            )
        return self.after_dropping(self.layers, model, base, folder)

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return how much of the output each unit can change, relative to all of it."""
        import torch

        scores = []
        x = model.embed(model.texts)
        for index, shape in enumerate(model.config.layers):
            moments, weights = Moments(), model.layer(index)
            x = model.run(index, x, moments.tap())
            units, means = {}, {}
            for name in parts_of(weights):
                values = torch.linalg.svdvals(weights[name])
                condition = float(values[0] / values[-1].clamp(min=1e-6 * values[0]))
                squares = moments.moment(name).double().diagonal()
                relative = (per_unit(squares, name, shape) / squares.sum()).sqrt()
                units[name] = condition * relative
                means[name] = moments.moment(name)
            scores.append(LayerScores(units, means))
        return scores

    def repair(
        self, weights: Mapping[str, Tensor], name: str, gone: Tensor, means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the matrix whose inputs that stay are scaled by the best mask."""
        import torch

        kept = ~gone
        matrix, moment = weights[name].double(), damped(means[name])
        part = matrix[:, kept]
        gram = (part.T @ part) * moment[kept][:, kept]
        wanted = ((part.T @ matrix) * moment[kept]).sum(1)
        ridge = 1e-6 * float(gram.diagonal().mean()) + 1e-30
        mask = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), wanted)
        return {name: (part * mask).float().contiguous()}

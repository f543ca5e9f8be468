"""Bonsai: how much each unit matters, regressed from the losses of random sub-models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner
from paceline.compress.structure.widths.submodels import (
    Unit,
    regressed,
    states_without,
    units_of,
)
from paceline.compress.whole_model import WholeModel, divergence
from paceline.core import Exactness
from paceline.models.formats.writer import write_json
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

_WIDER = 2.0  # weights of the units that are sampled, over those that go


@structures.register("bonsai", Exactness.LOSSY)
@dataclass(frozen=True)
class Bonsai(WidthPruner):
    """Remove MLP channels and groups of heads by the losses of sub-models, without gradients.

    Channels of a layer are put together by their prior, the size of their inputs of `down` times
    the norm of their weights there. Units with a small prior for their weights are candidates;
    random halves of them are switched off, and the divergence from the whole model is regressed on
    what was off. The units that cost least for their weights go, and all is repeated with the rest
    until `share` is gone. Losses are kept, so that an interrupted run goes on.

    Attributes:
        share: of the weights of the layers that is removed, 0.01 to 0.9. Default 0.2.
        multiple: MLP channels that go together, 1 to 1024. Default 32.
        rounds: of sampling and removal, 1 to 100. Default 2.
        samples: sub-models of a round, 2 to 100000. Default 64.
        rows: texts that sub-models are run on, 1 to 1000. Default 2.
        seed: of the sub-models. Default 0.
    """

    rounds: int = 2
    samples: int = 64
    rows: int = 2
    seed: int = 0

    source = Source(
        authors="Dery et al.",
        title="Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes",
        arxiv="2402.05406",
        section="section 3, algorithm 1",
        note="the loss is the divergence from the whole model; fine-tuning is `+recover`",
    )
    catalogue = (149,)
    examples = ("bonsai:multiple=8,samples=6,rows=1", "bonsai:multiple=16,rounds=1,samples=4")

    def __post_init__(self) -> None:
        WidthPruner.__post_init__(self)
        check_range(1, 100, self.name, rounds=self.rounds)
        check_range(2, 100_000, self.name, samples=self.samples)
        check_range(1, 1000, self.name, rows=self.rows)
        check_range(0, 2**63 - 1, self.name, seed=self.seed)

    def scores(self, model: WholeModel, base: WholeModel, folder: Path) -> list[LayerScores]:
        """Return for each unit the place at which it would go."""
        left = sorted(units_of(model, self.multiple), key=lambda unit: unit.prior)
        trial = _Trial(replace(model, texts=model.texts[: self.rows]).in_memory, folder)
        total = model.matrix_weights
        gone: list[Unit] = []
        for number in range(self.rounds):
            rest = self.share * total * (number + 1) / self.rounds - _weights(gone)
            candidates = _first(left, _WIDER * rest)
            costs = self._costs(trial, candidates, gone, number)
            order = sorted(range(len(candidates)), key=lambda at: costs[at] / candidates[at].size)
            removed = _first([candidates[at] for at in order], rest)
            gone += removed
            left = [unit for unit in left if unit not in removed]
        return _places(model, [*gone, *left])

    def _costs(
        self, trial: _Trial, candidates: Sequence[Unit], gone: Sequence[Unit], number: int
    ) -> list[float]:
        """Return what switching off each candidate costs, beside those that are gone."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        off = torch.rand(self.samples, len(candidates), generator=generator) < 0.5
        off[1::2] = ~off[0::2][: len(off[1::2])]  # every other one has the other half
        losses = [
            trial.loss(f"{number}-{at}", [*gone, *(candidates[i] for i in row.nonzero()[:, 0])])
            for at, row in enumerate(off)
        ]
        prior = torch.tensor([unit.prior * unit.size for unit in candidates], dtype=torch.float64)
        values = torch.tensor(losses, dtype=torch.float64)
        costs: list[float] = regressed(off.double(), values, prior).tolist()
        return costs


class _Trial:
    """Measures how far models without some units are from the whole one, and keeps the losses.

    Args:
        model: the whole one.
        folder: where losses are kept.
    """

    def __init__(self, model: WholeModel, folder: Path) -> None:
        self._model, self._file = model, folder / "losses.json"
        self._right: Tensor | None = None
        self._known: dict[str, float] = {}
        if self._file.is_file():
            self._known = dict(json.loads(self._file.read_text(encoding="utf-8")))

    def loss(self, name: str, off: Sequence[Unit]) -> float:
        """Return the divergence without some units, in nats a token; `name` is where it is kept."""
        if name not in self._known:
            if self._right is None:
                self._right = states_without(self._model, [])
            states = states_without(self._model, off)
            self._known[name] = divergence(self._model, self._right, states)
            write_json(self._file, self._known)
        return self._known[name]


def _weights(units: Sequence[Unit]) -> int:
    return sum(unit.size for unit in units)


def _first(units: Sequence[Unit], wanted: float) -> list[Unit]:
    """Return the first units, as many as have so many weights."""
    chosen = []
    for unit in units:
        if wanted <= 0:
            break
        chosen.append(unit)
        wanted -= unit.size
    return chosen


def _places(model: WholeModel, order: Sequence[Unit]) -> list[LayerScores]:
    """Return scores that say at which place of an order each unit is."""
    import torch

    scores = [LayerScores({}) for _ in model.config.layers]
    for place, unit in enumerate(order):
        shape, own = model.config.layers[unit.layer], scores[unit.layer].units
        count = shape.intermediate if unit.name == "down" else shape.kv_heads
        places = own.setdefault(unit.name, torch.zeros(count, dtype=torch.float64))
        places[unit.members] = float(place)
    return scores

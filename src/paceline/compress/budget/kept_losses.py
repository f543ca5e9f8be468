"""Losses of allocations, kept in a file so that an interrupted search goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.compress.allocate.base import Allocation
from paceline.models.formats.writer import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.compress.budget.level_loss import LevelLoss


@dataclass
class KeptLosses:
    """Losses of allocations, kept in a file.

    Attributes:
        folder: of the file.
        chosen: the level of the store for each level of each unit of an allocation.
        make: returns what measures a loss, when the first one is asked for that is not known.
    """

    folder: Path
    chosen: Callable[[int, int], int]
    make: Callable[[], LevelLoss]
    _known: dict[str, float] | None = None
    _judge: LevelLoss | None = None

    @property
    def evaluations(self) -> int:
        """Number of losses that are known."""
        return len(self._losses)

    def loss(self, allocation: Allocation, tokens: int) -> float:
        """See `Problem.loss`."""
        levels = [self.chosen(at, level) for at, level in enumerate(allocation)]
        return self._kept([tokens, levels], lambda judge: judge(tuple(levels), tokens))

    def trained_loss(self, allocation: Allocation, tokens: int) -> float:
        """See `Problem.trained_loss`."""
        levels = [self.chosen(at, level) for at, level in enumerate(allocation)]
        return self._kept(
            ["trained", tokens, levels], lambda judge: judge.after_training(tuple(levels), tokens)
        )

    def _kept(self, what: Sequence[object], measure: Callable[[LevelLoss], float]) -> float:
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
        if key not in self._losses:
            self._judge = self._judge or self.make()
            self._losses[key] = measure(self._judge)
            write_json(self._file, {"losses": self._losses})
        return self._losses[key]

    @property
    def _losses(self) -> dict[str, float]:
        if self._known is None:
            self._known = {}
            if self._file.is_file():
                self._known = dict(json.loads(self._file.read_text())["losses"])
        return self._known

    @property
    def _file(self) -> Path:
        return self.folder / "losses.json"

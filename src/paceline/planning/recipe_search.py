"""Find the smallest recipe that loses no more than a target: compress, measure, try the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import ModelError, RequestError
from paceline.lm import LM
from paceline.measuring.quality import Scores, Windows, paired
from paceline.models.formats.writer import write_json

if TYPE_CHECKING:
    from paceline.compress.calibrate import Calibration
    from paceline.compress.checkpoint import Size
    from paceline.compress.recipe import Recipe
    from paceline.models import Model

# From the smallest on; the kernels multiply all of them as they are stored. Tables of levels would
# be smaller by 3 %, and slower.
RECIPES = (
    "rtn:bits=4,group=128",
    "awq+gptq:bits=4,group=128",
    "awq+gptq:bits=4,group=32,symmetric=false,scale_bits=6",
    "awq+gptq:bits=5,group=32,symmetric=false,scale_bits=6",
    "awq+gptq:bits=6,group=32,symmetric=false,scale_bits=6",
    "rtn:bits=8,group=32",
)


class Found(NamedTuple):
    """A recipe that is good enough, and what it made.

    Attributes:
        job: that made it.
        texts: that it was calibrated on.
        size: of what was written.
        trials: (recipe, nats a token lost) of each that was tried, in order.
    """

    job: CompressionJob
    texts: Calibration
    size: Size
    trials: tuple[tuple[str, float], ...]


@dataclass
class RecipeSearch:
    """Tries recipes in order until one loses at most a target.

    An interrupted search goes on: what earlier recipes lost is kept beside the target folder.

    Attributes:
        model: the source.
        out: the folder to write.
        target: nats a token that may be lost on the windows.
        windows: of a text.
        head: recipe of embedding and head.
        again: compress what is stored in few bits already.
        threads: of the engine that measures.
        recipes: from the smallest on.
    """

    model: Model
    out: Path
    target: float
    windows: Windows
    head: str = "keep"
    again: bool = False
    threads: int | None = None
    recipes: tuple[str, ...] = RECIPES

    def run(
        self,
        texts: Callable[[Recipe], Calibration],
        tick: Callable[[int], None] = lambda done: None,
    ) -> Found:
        """Return the first recipe that is good enough, with its checkpoint written.

        Args:
            texts: returns the calibration texts of a recipe.
            tick: called with the number of blocks that have been finished.

        Raises:
            RequestError: none is good enough, or the folder cannot be written.
            ModelError, MethodError: as of `CompressionJob`.
        """
        CompressionJob(self.model, self.out, parse_recipe(self.recipes[0], self.head), self.again)
        trials = self._known()
        base: Scores | None = None
        for text in self.recipes:
            if text in trials and trials[text] > self.target:
                continue
            recipe = parse_recipe(text, self.head)
            shutil.rmtree(self._trial, ignore_errors=True)
            job = CompressionJob(self.model, self._trial, recipe, self.again)
            used = texts(recipe)
            size = job.run(used, tick)
            base = base or self._score(self.model.path)
            trials[text] = paired(self._score(self._trial), base).nats
            write_json(self._notes, {"for": self._describe(), "trials": trials})
            if trials[text] <= self.target:
                return self._keep(replace(job, out=self.out), used, size, trials)
        shutil.rmtree(self._trial, ignore_errors=True)
        self._notes.unlink(missing_ok=True)
        least = min(trials.values())
        raise RequestError(
            f"no recipe of the search loses at most {self.target:g} nats a token: the best one "
            f"loses {least:.4f}; raise --target-loss, or name a recipe of more bits"
        )

    def _keep(
        self, job: CompressionJob, texts: Calibration, size: Size, trials: dict[str, float]
    ) -> Found:
        try:
            self._trial.replace(self.out)
        except OSError as error:
            raise ModelError(f"cannot write {self.out}: {error.strerror or error}") from None
        self._notes.unlink(missing_ok=True)
        return Found(job, texts, size, tuple(trials.items()))

    def _score(self, path: Path) -> Scores:
        with LM(path, drafter="plain", budget=1, threads=self.threads) as lm:
            return self.windows.score(lm.engine)

    @property
    def _trial(self) -> Path:
        return self.out.with_name(f".{self.out.name}.trial")

    @property
    def _notes(self) -> Path:
        return self.out.with_name(f".{self.out.name}.trials.json")

    def _describe(self) -> list[object]:
        tokens = [int(self.windows.tokens.sum()), list(self.windows.tokens.shape)]
        return [self.model.fingerprint(), self.head, tokens]

    def _known(self) -> dict[str, float]:
        """Return what recipes lost in an interrupted search for the same."""
        try:
            known = json.loads(self._notes.read_text(encoding="utf-8"))
            if known["for"] == self._describe():
                return {str(name): float(lost) for name, lost in known["trials"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        return {}

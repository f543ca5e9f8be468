"""One run of the planner with real measurements: what `paceline plan` does, from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import monotonic

from paceline.engines.ensemble import parse_ensemble
from paceline.engines.native import default_threads
from paceline.errors import RequestError
from paceline.machine import free_bytes, usable_cores
from paceline.measuring.prompts import Dialogue
from paceline.planning.busy_watch import BusyWatch
from paceline.planning.candidates import checkpoints_here
from paceline.planning.known_facts import SourceFacts
from paceline.planning.lab import Lab
from paceline.planning.measurement_store import MeasurementStore, short_hash
from paceline.planning.measurer import EngineMeasurer
from paceline.planning.model_sizes import page_bytes, parameters
from paceline.planning.plan_search import PlanSearch
from paceline.planning.planner import Planner, PlanResult
from paceline.planning.setups import Goal, Setup
from paceline.planning.verification import ModelRunner, Verification

_MEASURING = 0.6  # share of the minutes after which nothing more is measured before verifying


@dataclass(frozen=True)
class PlanQuestion:
    """On what a plan is measured.

    Attributes:
        dialogues: prompts; the first turn of each is answered.
        text: on which losses are measured.
        own_text: it is the user's, and may be long enough for KV policies.
        tokens: of an answer.
        temperature: of the answers.
        judge: a command that scores answers; empty: losses are nats on the text.
    """

    dialogues: Sequence[Dialogue]
    text: str
    own_text: bool = False
    tokens: int = 48
    temperature: float = 0.0
    judge: str = ""


class PlanJob:
    """Plans one model for one goal on this machine.

    Args:
        model: as `LM` takes it.
        goal: to reach.
        question: on what is measured.
        minutes: maximum time; 0 measures nothing that is not known, and runs nothing.
        checkpoints: others of the same base.
        drafters: to consider beside the usual ones.
        say: is given a line for the user.

    Attributes:
        measurer: makes the measurements.
        lab: keeps them.

    Raises:
        PacelineError: the model or a checkpoint cannot be used, or several models are named.
    """

    def __init__(
        self,
        model: str,
        goal: Goal,
        question: PlanQuestion,
        minutes: float = 10.0,
        checkpoints: Sequence[str] = (),
        drafters: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if len(parse_ensemble(model)) > 1:
            raise RequestError("a plan is of one model, and several are named; name one")
        if goal.exact and checkpoints:
            raise RequestError("an exact plan runs the model as it is stored; leave out others")
        self._model, self._goal, self._question = model, goal, question
        self._drafters, self._checkpoints = drafters, checkpoints
        self._start, self._seconds, self._say = monotonic(), 60 * minutes, say
        self.measurer = EngineMeasurer(
            model,
            question.dialogues,
            question.text,
            question.own_text,
            question.tokens,
            question.temperature,
            question.judge,
        )
        self.lab = Lab(
            model,
            MeasurementStore(self.measurer.fingerprint(model), say=say),
            self.measurer,
            BusyWatch(say=say, hurried=lambda: monotonic() > self._start + self._seconds),
            self._start + _MEASURING * self._seconds,
            (short_hash([self.measurer.question, question.judge]),),
            bool(question.judge),
            say=say,
        )

    def run(self) -> PlanResult:
        """Return the plan.

        Raises:
            RequestError: nothing reaches the goal; says what would.
        """
        verification = self.verification() if self._seconds > 0 else None
        planner = Planner(
            self.search, verification, self.measurer.fingerprint, free_bytes(), self._say
        )
        return planner.run()

    @cached_property
    def search(self) -> PlanSearch:
        """The search for setups, which has measured nothing yet.

        Raises:
            RequestError: the goal's context is longer than the model's.
        """
        return PlanSearch(
            self._goal,
            source_facts(self._model, self.measurer),
            self.lab,
            self.measurer.prompts,
            self._others(),
            self._drafters,
            self._question.own_text,
        )

    def verification(self, rounds: int = 3) -> Verification:
        """Return what runs setups in turns."""
        return Verification(
            self._open,
            self.lab.watch,
            self._start + self._seconds,
            rounds,
            alone=self.lab.store.alone,
        )

    def _open(self, setup: Setup) -> ModelRunner:
        self.measurer.close()  # its models are not needed beside those that are run
        return ModelRunner(setup, self.measurer.requests, self._goal.users)

    def _others(self) -> dict[str, int]:
        """Return other checkpoints of the same base with their bytes."""
        measurer, found = self.measurer, {}
        for path in self._checkpoints:
            measurer.check_tokens(path)
            if path != self._model:
                found[path] = measurer.checkpoint(path).weights.nbytes()
        if not self._goal.exact:
            for path in checkpoints_here(measurer.model, self._model):
                found.setdefault(path, measurer.checkpoint(path).weights.nbytes())
        return found


def source_facts(model: str, measurer: EngineMeasurer) -> SourceFacts:
    """Return what is known of a model before anything runs."""
    checkpoint = measurer.model
    return SourceFacts(
        model,
        checkpoint.name,
        checkpoint.weights.nbytes(),
        parameters(checkpoint),
        page_bytes(checkpoint),
        checkpoint.config.vocab_size,
        checkpoint.config.context,
        usable_cores(),
        default_threads(),
    )

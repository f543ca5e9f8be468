"""Contract of search strategies: the task, the strategy and its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from paceline.compatibility import Side, check, check_needs
from paceline.control.capabilities import Forkable, RunsModel, SingleSequence
from paceline.core import Output, Request, Tokens
from paceline.decoding.governor import Budget, Fixed
from paceline.decoding.session import check_request
from paceline.decoding.text_stream import TextStream
from paceline.drafters.base import Drafter
from paceline.engines.base import Engine
from paceline.errors import MethodError
from paceline.registry import Method


@dataclass(slots=True)
class SearchOutput(Output):
    """One output of a search. Passes, nodes and seconds are those of the whole search.

    Attributes:
        score: what outputs are ranked by, higher is better; each strategy defines it.
    """

    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """A request to search, and what to search with.

    Attributes:
        engine: runs the model.
        request: what to generate.
        stream: turns tokens into text and finds stop strings; None when only tokens matter.
        rebind: builds the request for another seed, with new controls, as some controls follow one
            text only.
        drafter: for strategies that draft; None: decode plainly.
        another: makes one more drafter, for texts that share passes.
        budget: decides how many nodes a draft tree may have.
        known_texts: returns texts, each [S], whose n-grams a strategy may count.
    """

    engine: Engine
    request: Request
    stream: Callable[[], TextStream] | None = None
    rebind: Callable[[int], Request] | None = None
    drafter: Drafter | None = None
    another: Callable[[], Drafter] | None = None
    budget: Budget = field(default_factory=lambda: Fixed(0))
    known_texts: Callable[[], Sequence[Tokens]] = tuple

    def seeded(self, seed: int) -> Request:
        """Return the request with another seed.

        Raises:
            MethodError: its noise is bound to its seed, and there is no `rebind`.
        """
        if self.rebind:
            return self.rebind(seed)
        if self.request.noise is not None and seed != self.request.seed:
            raise MethodError("a watermark's noise is bound to one seed; give the task a rebind")
        return replace(self.request, seed=seed)

    @property
    def limit(self) -> int:
        """Maximum number of new tokens that the request and the model's context allow."""
        room = self.engine.config.context - len(self.request.prompt)
        return min(self.request.max_new_tokens, room)

    def read(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Return the text of new tokens, and whether a stop token or stop string ends them."""
        ended = bool(tokens) and tokens[-1] in self.request.stop_tokens
        if self.stream is None:
            return "", ended
        stream = self.stream()
        text = "".join(stream.push(token) for token in (tokens[:-1] if ended else tokens))
        return text + stream.flush(), ended or stream.stopped

    def ends(self, tokens: Sequence[int]) -> bool:
        """Return whether a stop token or stop string ends new `tokens`."""
        if tokens[-1] in self.request.stop_tokens or not self.request.stop_strings:
            return tokens[-1] in self.request.stop_tokens
        return self.read(tokens)[1]


@dataclass(frozen=True)
class Strategy(Method, ABC):
    """Settings of a search.

    Attributes:
        draws: whether it draws tokens, so that temperature and seed matter.
        revisits: whether it returns to texts that it has left.
    """

    draws: ClassVar[bool] = False
    revisits: ClassVar[bool] = False

    @property
    def drafts(self) -> bool:
        """Whether it uses the walk, so that a drafter makes it faster."""
        return False

    @abstractmethod
    def run(self, task: Task) -> list[SearchOutput]:
        """Return the outputs, best first; after a `KeyboardInterrupt` those so far, marked as such.

        Every sequence is released, whatever happens.

        Raises:
            PacelineError: the strategy cannot follow the task.
        """

    def check(self, task: Task) -> None:
        """Refuse a request that this strategy cannot follow.

        Raises:
            RequestError, MethodError: says what is wrong and what to do.
        """
        request = task.request
        check_request(task.engine, request)
        check_needs(
            f"the strategy {self.name}", self.needs, task.engine.name, task.engine.abilities
        )
        check(self._sides(request))

    def _sides(self, request: Request) -> dict[Side, str]:
        """Return what this strategy and a request bring together."""
        own = f"the strategy {self.name}"
        sides = {Side.SEARCH: own}
        if not self.draws:
            sides[Side.DRAWLESS_SEARCH] = own
        if not self.drafts:
            sides[Side.DRAFTLESS_SEARCH] = own
        if self.revisits:
            sides[Side.REVISITING_SEARCH] = own
        if request.temperature > 0:
            sides[Side.TEMPERATURE] = f"the temperature {request.temperature:g}"
        if request.walk != "gumbel":
            sides[Side.REJECTION] = f"the {request.walk} walk"
        if request.noise is not None:
            sides[Side.NOISE_WATERMARK] = "this watermark"
        if request.kv_policy is not None:
            sides[Side.KV_POLICY] = f"the KV policy {request.kv_policy.name}"
        if request.documents is not None:
            sides[Side.DOCUMENTS] = "documents"
        if request.prediction:
            sides[Side.PREDICTION] = "a prediction"
        if request.controls:
            sides[Side.CONTROLS] = "controls"
        if any(isinstance(each, SingleSequence) for each in request.controls):
            sides[Side.ONE_TEXT_CONTROL] = "a control that follows one text, as mirostat does,"
        for guide in (each for each in request.controls if isinstance(each, RunsModel)):
            if not isinstance(guide, Forkable):
                sides[Side.ONE_TEXT_GUIDE] = "a guide that follows one text"
            elif guide.append_only:
                sides[Side.GROWING_TEXT_GUIDE] = "the guide cfg with stop"
        return sides

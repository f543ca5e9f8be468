"""Minimum length."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import ControlMethod, require
from paceline.control.logits import forbid
from paceline.core import Control, Exactness, Floats, Request
from paceline.errors import RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("min_length", Exactness.EXACT)
@dataclass(frozen=True)
class MinLength(ControlMethod):
    """Forbid stop tokens until the output has a minimum length.

    Stop strings are not forbidden; those that are complete by then do not end the output.

    Attributes:
        tokens: minimum number of new tokens before a stop token, at least 0.
    """

    tokens: int

    order = 32
    examples = ("min_length:tokens=6",)
    source = Source(title="Hugging Face transformers, min_new_tokens")

    def __post_init__(self) -> None:
        require(self.tokens >= 0, "min_length", self.tokens, "at least 0")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for the request's stop tokens.

        Raises:
            RequestError: the request allows fewer new tokens.
        """
        if self.tokens > request.max_new_tokens:
            raise RequestError(
                f"min_length is {self.tokens}, expected at most the {request.max_new_tokens} "
                "new tokens that the request allows"
            )
        return _MinLength(len(request.prompt) + self.tokens, sorted(request.stop_tokens))


@dataclass(frozen=True)
class _MinLength:
    end: int
    stops: list[int]

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        return forbid(logits, self.stops) if len(history) < self.end and self.stops else logits

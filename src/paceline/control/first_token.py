"""Forced first token."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import ControlMethod, Force, require
from paceline.core import Control, Exactness, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("first_token", Exactness.EXACT)
@dataclass(frozen=True)
class FirstToken(ControlMethod):
    """Force the first token of the output.

    Attributes:
        token: the token id.
    """

    token: int

    order = 11
    examples = ("first_token:token=410",)
    source = Source(title="Hugging Face transformers, forced_bos_token_id")

    def __post_init__(self) -> None:
        require(self.token >= 0, "first_token", self.token, "a token id")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for the position after the prompt."""
        vocabulary.known("first_token", [self.token])
        return Force(self.token, len(request.prompt))

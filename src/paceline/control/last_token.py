"""Forced last token."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.control.base import ControlMethod, Force, require
from paceline.core import Control, Exactness, Request
from paceline.models.vocabulary import Vocabulary
from paceline.registry import Source, controls


@controls.register("last_token", Exactness.EXACT)
@dataclass(frozen=True)
class LastToken(ControlMethod):
    """Force the last token of an output that reaches `max_new_tokens`; others are left alone.

    Attributes:
        token: the token id, e.g. end of text.
    """

    token: int

    order = 12
    examples = ("last_token:token=2",)
    source = Source(title="Hugging Face transformers, forced_eos_token_id")

    def __post_init__(self) -> None:
        require(self.token >= 0, "last_token", self.token, "a token id")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """Return the control for the last position that the output may have."""
        vocabulary.known("last_token", [self.token])
        return Force(self.token, len(request.prompt) + request.max_new_tokens - 1)

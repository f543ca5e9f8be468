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
    """An output that uses up `max_new_tokens` ends with this token; others end where they end.

    Attributes:
        token: its id, e.g. that of the end of text.
    """

    token: int

    order = 12
    source = Source(title="Hugging Face transformers, forced_eos_token_id")

    def __post_init__(self) -> None:
        require(self.token >= 0, "last_token", self.token, "a token id")

    def bind(self, request: Request, vocabulary: Vocabulary) -> Control:
        """At the last of the new tokens."""
        vocabulary.known("last_token", [self.token])
        return Force(self.token, len(request.prompt) + request.max_new_tokens - 1)

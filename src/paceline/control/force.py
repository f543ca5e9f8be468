"""One token at one position, for `first_token` and `last_token`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Floats


@dataclass(frozen=True)
class Force:
    """Allows only `token` at `position`, where it is allowed even if it was forbidden before."""

    token: int
    position: int

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """See `core.Control`."""
        if len(history) != self.position:
            return logits
        edited = np.full_like(logits, -np.inf)
        edited[self.token] = 0.0
        return edited

    def forced(self, history: list[int]) -> list[int]:
        """See `Forcing`."""
        return [self.token] if len(history) == self.position else []

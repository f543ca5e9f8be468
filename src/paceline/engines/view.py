"""The part of a model that a drafting pass uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Tokens
from paceline.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The part of a model that a drafting pass uses.

    Attributes:
        layers: int32, increasing indices of the layers that are run; the others are skipped. None
            runs all.
        positions: int32, increasing committed positions that the nodes attend to besides their own
            ancestors. Positions do not change, and windows apply as usual. None attends to all.
            The rows are gathered in every pass: aligned runs of 16 are cheap, scattered ones can
            cost as much as attending to everything.
        tokens: int32, increasing ids, at least one: logits are computed for these only, a column
            each in this order. None computes all. The native engine gathers their rows of the head
            and keeps them until other tokens are requested, so reuse the same set.
        exits: int32, increasing counts below the number of layers that are run: logits are also
            computed after so many layers, as if the later ones were skipped. `forward` returns all
            rows of the first exit, then those of the next, and last those after all layers.
    """

    layers: Tokens | None = None
    positions: Tokens | None = None
    tokens: Tokens | None = None
    exits: Tokens | None = None

    def check(self, layers: int, length: int, vocab_size: int) -> None:
        """Refuse what does not fit a model of `layers` layers or `length` committed positions.

        Raises:
            RequestError: as said.
        """
        ends = {
            "layers": (self.layers, layers),
            "positions": (self.positions, length),
            "tokens": (self.tokens, vocab_size),
            "exits": (self.exits, layers if self.layers is None else len(self.layers)),
        }
        for name, (part, end) in ends.items():
            if part is None:
                continue
            if not isinstance(part, np.ndarray) or part.ndim != 1 or part.dtype != np.int32:
                raise RequestError(f"the {name} of a view are {part!r:.80}, expected an int32 list")
            if len(part) and (part[0] < 0 or part[-1] >= end or (np.diff(part) <= 0).any()):
                raise RequestError(
                    f"the {name} of a view are {part}, expected increasing ones below {end}"
                )
        if self.tokens is not None and not len(self.tokens):
            raise RequestError("the tokens of a view are [], expected one at least")

    @property
    def partial(self) -> bool:
        """Whether keys and values differ from those of the whole model: no commit is possible."""
        return self.layers is not None or self.positions is not None

    @property
    def heads(self) -> int:
        """Number of rows of logits per node: one for each exit, and one after all layers."""
        return 1 + (0 if self.exits is None else len(self.exits))

    def width(self, vocab_size: int) -> int:
        """Return the number of logits per row, for a vocabulary of that size."""
        return vocab_size if self.tokens is None else len(self.tokens)

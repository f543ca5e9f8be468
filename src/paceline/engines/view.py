"""The part of a model that a drafting pass uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Tokens
from paceline.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The part of a model that a pass uses which only drafts.

    Attributes:
        layers: int32, increasing indices of the layers that are run; the others pass on what they
            get. None runs all.
        positions: int32, increasing committed positions that the nodes see besides their own
            ancestors; every position stays where it is. A window hides those outside it as ever.
            None shows all. They are gathered in every pass: runs of sixteen aligned ones are
            cheap, scattered ones can cost as much as to see everything.
        tokens: int32, increasing ids, at least one: those that get logits, a column each in this
            order. None gives all. The native engine gathers their rows of the head, and keeps them
            until other ones are asked for: ask for the same again and again.
        exits: int32, increasing numbers below that of the layers that are run: behind so many of
            them logits are made, too, as if the others were left out. `forward` gives all rows of
            the first exit, then those of the next, and last those behind all layers.
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
        """Keys and values are not those of the whole model, and cannot be committed."""
        return self.layers is not None or self.positions is not None

    @property
    def heads(self) -> int:
        """Rows of each node: one behind each exit, and one behind all layers."""
        return 1 + (0 if self.exits is None else len(self.exits))

    def width(self, vocab_size: int) -> int:
        """Logits of each node, of a model with so many tokens."""
        return vocab_size if self.tokens is None else len(self.tokens)

"""Logits of a pass whose head was read in part: coarse ones, and exact ones where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from paceline import _native
from paceline.core import Floats, Tokens


class ScreenedLogits:
    """Logits [N, V] of a pass that become exact where a draw needs them; until the next pass.

    A coarse copy of the head gives every logit approximately, with a rigorous bound of the
    difference. Rows of the head that cannot win a draw by these bounds are never read. Logits that
    are computed have the bits that the whole head gives.

    Args:
        inner: the native pass.
        first: the first of its rows that belong here.
        stop: the row behind the last.
    """

    def __init__(self, inner: _native.NativeScreenedLogits, first: int, stop: int) -> None:
        self._inner, self._first, self._stop = inner, first, stop
        self.values: Floats = inner.values[first:stop]
        """Coarse logits, float32 [N, V], exact where they have been computed."""

    def __len__(self) -> int:
        return self._stop - self._first

    def part(self, first: int, stop: int) -> ScreenedLogits:
        """Return rows `first` to `stop - 1`."""
        return ScreenedLogits(self._inner, self._first + first, self._first + stop)

    def contenders(
        self, row: int, temperature: float, noise: int | None
    ) -> tuple[Tokens, Floats] | None:
        """Return all tokens that can have the best score, and their logits.

        A score is logit / temperature plus the noise of `noise.perturbation`.

        Args:
            row: node of the tree.
            temperature: above 0; 1 leaves logits as they are.
            noise: start of the noise stream, None for a draw without noise.

        Returns:
            tokens, int32 [n], ascending, and their exact logits, float32 [n]; None where so many
            remain that `row` is no dearer.
        """
        return self._inner.contenders(self._first + row, temperature, noise)

    def at_least(self, row: int, least: float) -> tuple[Tokens, Floats] | None:
        """Return all tokens whose logit is at least `least`, and their logits; as `contenders`."""
        return self._inner.at_least(self._first + row, least)

    def row(self, row: int) -> Floats:
        """Return all exact logits of a row, float32 [V]: the whole head is read."""
        self._inner.complete(self._first + row)
        logits: Floats = self.values[row]
        return logits


Logits = Floats | ScreenedLogits


def split_logits(logits: Logits, sizes: Sequence[int]) -> list[Logits]:
    """Return the rows of each entry of a batch, of which there are `sizes`."""
    stops = list(accumulate(sizes))
    spans = zip(stops, sizes, strict=True)
    if isinstance(logits, ScreenedLogits):
        return [logits.part(stop - size, stop) for stop, size in spans]
    return [logits[stop - size : stop] for stop, size in spans]


def coarse(logits: Logits) -> Floats:
    """Return logits [N, V] for learning, of which some may be approximate."""
    return logits.values if isinstance(logits, ScreenedLogits) else logits

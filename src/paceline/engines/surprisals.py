"""How improbable each committed token of a sequence was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from paceline import _native
from paceline.core import Floats, TokenTree
from paceline.errors import RequestError


class Surprisals:
    """Negative log-probabilities of a sequence's committed tokens, each given those before it.

    They are functions of the committed text, and as invariant as logits are. The logits behind the
    last position are kept, [V], and those of a pass until it is committed.
    """

    def __init__(self) -> None:
        self._values: list[float] = []
        self._behind: Floats | None = None  # logits behind the last committed position
        self._pending: tuple[TokenTree, Floats] | None = None

    @property
    def values(self) -> NDArray[np.float64]:
        """Surprisal of each position in nats, float64 [S]; 0 of the first."""
        return np.array(self._values)

    def note(self, tree: TokenTree, logits: Floats | None) -> None:
        """Keep the logits [N, V] of a pass; without them it cannot be committed."""
        self._pending = None if logits is None else (tree, logits.copy())

    def commit(self, path: Sequence[int] | NDArray[np.integer]) -> None:
        """Add the tokens of a path of the last pass.

        Raises:
            RequestError: the pass gave no logits of all tokens.
        """
        if self._pending is None:
            raise RequestError(
                "a sequence that tracks surprisal cannot commit a pass without all logits"
            )
        (tree, logits), self._pending = self._pending, None
        nodes = np.asarray(path, np.int64)
        if not len(nodes):
            return
        tokens = tree.tokens[nodes]
        if self._behind is None:
            self._values.append(0.0)
            rows, tokens = logits[nodes[:-1]], tokens[1:]
        else:
            rows = np.concatenate([self._behind[None], logits[nodes[:-1]]])
        self._values += _surprisal(rows, tokens)
        self._behind = logits[nodes[-1]].copy()

    def truncate(self, length: int) -> None:
        """Forget all positions, or none.

        Raises:
            RequestError: `length` lies between.
        """
        if 0 < length < len(self._values):
            raise RequestError(
                f"cannot cut to {length} positions: logits of earlier ones were dropped"
            )
        self._pending = None
        if not length:
            self._values, self._behind = [], None

    def fork(self) -> Surprisals:
        """Return an independent copy."""
        other = Surprisals()
        other._values, other._behind = list(self._values), self._behind
        return other


def _surprisal(logits: Floats, tokens: NDArray[np.int32]) -> list[float]:
    """Return -log softmax(logits [N, V]) at tokens [N], in nats."""
    if not len(tokens):
        return []
    top, probs = _native.top_k(np.ascontiguousarray(logits), 1, None)
    rows = np.arange(len(tokens))
    gaps = logits[rows, top[:, 0]].astype(np.float64) - logits[rows, tokens]
    values: list[float] = (gaps - np.log(probs[:, 0].astype(np.float64))).tolist()
    return values

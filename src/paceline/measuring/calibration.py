"""Calibration of scores: the probability that a drafter claimed, and how often it was right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.core import TokenTree
from paceline.decoding.governor import judged

Pass = tuple[TokenTree, list[int]]  # a tree and its accepted nodes, root first

BUCKETS = 10  # equal intervals of the score
DEPTHS = 16  # the last one counts all deeper nodes, too


class Reliability:
    """Drafted nodes counted by origin, depth and bucket of their score.

    Only a node whose parent was accepted is tested: a score is the probability that a node is
    accepted given that its parent is.
    """

    def __init__(self) -> None:
        # Tested nodes, sum of scores, accepted nodes: [3, origins, DEPTHS, BUCKETS].
        self._sums: NDArray[np.float64] = np.zeros((3, 0, DEPTHS, BUCKETS))
        # Nodes, tested or not, and sum of squared errors: [2, origins].
        self._more: NDArray[np.float64] = np.zeros((2, 0))

    def learn(self, passes: Sequence[Pass]) -> None:
        """Count every drafted node of some passes."""
        for tree, path in passes:
            if len(tree) > 1:
                self._count(tree, path)

    def _count(self, tree: TokenTree, path: list[int]) -> None:
        missing = int(tree.origin.max()) + 1 - self._more.shape[1]
        if missing > 0:
            self._sums = np.pad(self._sums, ((0, 0), (0, missing), (0, 0), (0, 0)))
            self._more = np.pad(self._more, ((0, 0), (0, missing)))
        tested, accepted = judged(tree, path)
        origin, true = tree.origin[tested], accepted[tested]
        score = tree.scores[tested].astype(np.float64)
        depth = np.minimum(tree.depths()[tested], DEPTHS) - 1
        bucket = np.minimum((score * BUCKETS).astype(np.int64), BUCKETS - 1)
        for sums, values in zip(self._sums, (np.ones(len(true)), score, true), strict=True):
            np.add.at(sums, (origin, depth, bucket), values)
        np.add.at(self._more[0], tree.origin[1:], 1.0)
        np.add.at(self._more[1], origin, (score - true) ** 2)

    def rows(self, origins: Sequence[str]) -> list[dict[str, Any]]:
        """Return, for each origin that drafted, its totals, and the same by bucket and by depth.

        `brier` is the mean squared error of the scores (Brier 1950); `error` is the expected
        calibration error: |predicted - observed| of a bucket, averaged over nodes.
        """
        guessing = np.flatnonzero(self._more[0]).tolist()
        return [self._row(index, origins[index]) for index in guessing]

    def _row(self, origin: int, name: str) -> dict[str, Any]:
        sums = self._sums[:, origin]
        buckets, depths = sums.sum(1), sums.sum(2)
        guessed, squares = self._more[:, origin].tolist()
        tested = float(buckets[0].sum())
        gaps = float(np.abs(buckets[1] - buckets[2]).sum())
        return {
            "origin": name,
            "guessed": int(guessed),
            **_rates(buckets.sum(1)),
            "brier": squares / tested if tested else None,
            "error": gaps / tested if tested else None,
            "buckets": [
                {"low": place / BUCKETS, "high": (place + 1) / BUCKETS, **rates}
                for place, rates in _filled(buckets)
            ],
            "depths": [{"depth": place + 1, **rates} for place, rates in _filled(depths)],
        }


def _filled(sums: NDArray[np.float64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the places of `sums` [3, places] at which nodes were tested, and their rates."""
    for place in np.flatnonzero(sums[0]).tolist():
        yield place, _rates(sums[:, place])


def _rates(sums: NDArray[np.float64]) -> dict[str, Any]:
    tested, claimed, accepted = sums.tolist()
    return {
        "tested": int(tested),
        "predicted": claimed / tested if tested else None,
        "observed": accepted / tested if tested else None,
    }

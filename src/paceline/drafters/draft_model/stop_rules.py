"""When a draft model stops drafting and hands its tree over."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.core import State
from paceline.errors import MethodError

NAMES = ("confidence", "bandit", "depth")


class Stop(Protocol):
    """Decides before every pass of a draft model but the first."""

    def begin(self, seed: int, position: int) -> None:
        """A proposal begins at a position of a request with a seed."""
        ...

    def more(self, passes: int, reach: float) -> bool:
        """After `passes`, is one worth it whose nodes are reached with the chance `reach`?"""
        ...

    def learn(self, offered: int, accepted: int) -> None:
        """Of a tree's `offered` levels so many were accepted."""
        ...

    def state(self) -> State:
        """What was learnt."""
        ...

    def load(self, state: State) -> None:
        """Take it over."""
        ...

    def reset(self) -> None:
        """Forget it."""
        ...


class Confidence:
    """Stops when what would be run is reached with a chance below `threshold`.

    On a chain this is SpecDec++'s rule (arXiv 2405.19715): stop when the chance that
    something was rejected already is above one minus the threshold. The chances are the draft's
    calibrated ones, where the paper trains a head.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def begin(self, seed: int, position: int) -> None:
        """See `Stop`."""

    def more(self, passes: int, reach: float) -> bool:
        """See `Stop`."""
        return reach >= self._threshold

    def learn(self, offered: int, accepted: int) -> None:
        """See `Stop`."""

    def state(self) -> State:
        """See `Stop`."""
        return {}

    def load(self, state: State) -> None:
        """See `Stop`."""

    def reset(self) -> None:
        """See `Stop`."""


class Bandit(Confidence):
    """Thompson sampling, as in EESD (arXiv 2406.03853).

    The chance that a drafted level is accepted has a Beta posterior. Before each pass one chance
    is drawn from it, and with that chance drafting goes on.
    """

    _PRIOR = (2.0, 1.0)  # go on at first: what is never drafted is never learnt

    def __init__(self) -> None:
        super().__init__(0.0)
        self._counts: NDArray[np.float64] = np.array(self._PRIOR)

    def begin(self, seed: int, position: int) -> None:
        """See `Stop`."""
        self._random = np.random.default_rng((seed % (1 << 64), position))

    def more(self, passes: int, reach: float) -> bool:
        """See `Stop`."""
        return bool(self._random.random() < self._random.beta(*self._counts))

    def learn(self, offered: int, accepted: int) -> None:
        """See `Stop`."""
        self._counts[0] += accepted
        self._counts[1] += accepted < offered

    def state(self) -> State:
        """See `Stop`."""
        return {"bandit": self._counts.copy()}

    def load(self, state: State) -> None:
        """See `Stop`.

        Raises:
            MethodError: the counts are none.
        """
        counts = state["bandit"]
        right = counts.shape == (2,) and counts.dtype == np.float64
        if not (right and (np.isfinite(counts) & (counts > 0)).all()):
            raise MethodError("this state holds impossible counts of a bandit; reset it")
        self._counts = counts.copy()

    def reset(self) -> None:
        """See `Stop`."""
        self._counts = np.array(self._PRIOR)


def stop_rule(name: str, threshold: float) -> Stop:
    """The rule of that name; `depth` stops at the deepest level only."""
    if name == "bandit":
        return Bandit()
    return Confidence(threshold if name == "confidence" else 0.0)

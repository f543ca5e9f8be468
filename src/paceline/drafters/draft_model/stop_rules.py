"""Rules that end drafting before the deepest level."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.core import State
from paceline.drafters.state import checked

NAMES = ("confidence", "adaptive", "bandit", "depth")
_FIRST = 0.2  # threshold that `adaptive` begins with, the default of `confidence`
_LEAST = 2.0**-10  # that it falls to


class StopRule(Protocol):
    """Decides before each pass of a draft model but the first."""

    def begin(self, seed: int, position: int) -> None:
        """Start a proposal at `position` of a request with `seed`."""
        ...

    def more(self, passes: int, reach: float) -> bool:
        """Return whether to run another pass, whose nodes are reached with probability `reach`."""
        ...

    def learn(self, offered: int, accepted: int) -> None:
        """Record that `accepted` of `offered` draft levels were accepted."""
        ...

    def state(self) -> State:
        """Return what was learnt."""
        ...

    def load(self, state: State) -> None:
        """Restore what `state` returned; other names are ignored."""
        ...

    def reset(self) -> None:
        """Forget what was learnt."""
        ...


class Confidence:
    """Stops when the next nodes are reached with a probability below `threshold`.

    On a chain this is SpecDec++'s rule (arXiv 2405.19715): stop when the probability that a token
    has already been rejected exceeds one minus the threshold. The probabilities are the draft's
    calibrated ones, where the paper trains a head.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def begin(self, seed: int, position: int) -> None:
        """See `StopRule`."""

    def more(self, passes: int, reach: float) -> bool:
        """See `StopRule`."""
        return reach >= self._threshold

    def learn(self, offered: int, accepted: int) -> None:
        """See `StopRule`."""

    def state(self) -> State:
        """See `StopRule`."""
        return {}

    def load(self, state: State) -> None:
        """See `StopRule`."""

    def reset(self) -> None:
        """See `StopRule`."""


class Adaptive(Confidence):
    """Stops as `Confidence` does, at a threshold that follows what is accepted.

    It halves when the target accepts all draft levels, and grows by a factor of two to the power of
    the rejected share otherwise. Based on Xu et al., LLMCad, arXiv 2309.04255 (catalogue 111), its
    self-adjusting fallback, with the probability of reaching the next nodes for that of a chain.
    """

    def __init__(self) -> None:
        super().__init__(_FIRST)

    def learn(self, offered: int, accepted: int) -> None:
        """See `StopRule`."""
        if offered:
            rejected = (offered - accepted) / offered
            factor = 2.0**rejected if rejected else 0.5
            self._threshold = min(max(self._threshold * factor, _LEAST), 1.0)

    def state(self) -> State:
        """See `StopRule`."""
        return {"threshold": np.array([self._threshold])}

    def load(self, state: State) -> None:
        """See `StopRule`.

        Raises:
            MethodError: it is not such a state.
        """
        own = {"threshold": state["threshold"]} if "threshold" in state else {}
        limits = {"threshold": (_LEAST, 1.0)}
        checked("a draft model with stop=adaptive", own, self.state(), limits)
        self._threshold = float(own["threshold"][0])

    def reset(self) -> None:
        """See `StopRule`."""
        self._threshold = _FIRST


class Bandit(Confidence):
    """Thompson sampling, as in EESD (arXiv 2406.03853).

    The probability that a draft level is accepted has a Beta posterior. Before each pass a
    probability is drawn from it, and drafting goes on with that probability.
    """

    _PRIOR = (2.0, 1.0)  # go on at first: what is never drafted is never learnt

    def __init__(self) -> None:
        super().__init__(0.0)
        self._counts: NDArray[np.float64] = np.array(self._PRIOR)

    def begin(self, seed: int, position: int) -> None:
        """See `StopRule`."""
        self._random = np.random.default_rng((seed % (1 << 64), position))

    def more(self, passes: int, reach: float) -> bool:
        """See `StopRule`."""
        return bool(self._random.random() < self._random.beta(*self._counts))

    def learn(self, offered: int, accepted: int) -> None:
        """See `StopRule`."""
        self._counts[0] += accepted
        self._counts[1] += accepted < offered

    def state(self) -> State:
        """See `StopRule`."""
        return {"bandit": self._counts.copy()}

    def load(self, state: State) -> None:
        """See `StopRule`.

        Raises:
            MethodError: it is not such a state.
        """
        own = {"bandit": state["bandit"]} if "bandit" in state else {}
        tiny = float(np.finfo(np.float64).tiny)
        checked("a draft model with stop=bandit", own, self.state(), {"bandit": (tiny, np.inf)})
        self._counts = own["bandit"].copy()

    def reset(self) -> None:
        """See `StopRule`."""
        self._counts = np.array(self._PRIOR)


def stop_rule(name: str, threshold: float) -> StopRule:
    """Return the rule of that name; `depth` stops at the deepest level only."""
    if name == "bandit":
        return Bandit()
    if name == "adaptive":
        return Adaptive()
    return Confidence(threshold if name == "confidence" else 0.0)

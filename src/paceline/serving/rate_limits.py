"""How much each client may ask for in a time, and how soon a place comes free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from paceline.serving.messages import Job, JobEvent

_MOST = 10_000  # clients that are remembered
_KEPT = 32  # ends of requests that tell the pace
_LONGEST = 60  # seconds; OpenAI's clients heed no longer Retry-After


@dataclass
class Bucket:
    """Fills with `rate` a second up to a minute's worth; what is taken may leave a debt.

    Attributes:
        rate: a second.
        level: what is there; below 0 nothing is given.
        at: when, in seconds of the caller's clock.
    """

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """A new one; it holds 1 at least, so that something can be had at all."""
        return cls(rate, max(60 * rate, 1.0), now)

    def fill(self, now: float) -> None:
        """Let it fill until now."""
        most = max(60 * self.rate, 1.0)
        self.level = min(most, self.level + self.rate * max(now - self.at, 0.0))
        self.at = max(now, self.at)

    def wait(self, amount: float) -> float:
        """Seconds until it holds so much, as it was filled last."""
        return max(amount - self.level, 0.0) / self.rate


@dataclass
class RateLimits:
    """The buckets of all clients: requests are paid before, tokens when they are known.

    Attributes:
        requests: a minute of each client; None is any number.
        tokens: a minute, read or written; what was cached is free. None is any number.
    """

    requests: float | None = None
    tokens: float | None = None
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)

    def admit(self, client: str, now: float) -> float:
        """Take a request; returns 0, or the seconds to wait where there is none to take."""
        waits = [0.0]
        if self.tokens is not None:  # a debt must be paid
            bucket = self._bucket("tokens", client, self.tokens, now)
            waits.append(bucket.wait(1.0) if bucket.level <= 0 else 0.0)
        if self.requests is not None:
            bucket = self._bucket("requests", client, self.requests, now)
            waits.append(bucket.wait(1.0))
            bucket.level -= not any(waits)
        return max(waits)

    def charge(self, client: str, tokens: int, now: float) -> None:
        """So many tokens were read or written."""
        if self.tokens is not None:
            self._bucket("tokens", client, self.tokens, now).level -= tokens

    def _bucket(self, kind: str, client: str, rate: float, now: float) -> Bucket:
        if len(self._buckets) > _MOST:
            for bucket in self._buckets.values():
                bucket.fill(now)
            full = [key for key, bucket in self._buckets.items() if bucket.wait(60 * bucket.rate)]
            self._buckets = {key: self._buckets[key] for key in full}
        found = self._buckets.setdefault((kind, client), Bucket.full(rate / 60, now))
        found.fill(now)
        return found


class Departures:
    """How often requests end while there are any: a service's `Observer`.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._under_way: set[str] = set()
        self._since = 0.0  # the last end, or the first request after a pause
        self._gaps: deque[float] = deque(maxlen=_KEPT)

    def took(self, job: Job) -> None:
        """See `Observer`."""
        if not self._under_way:
            self._since = self._clock()
        self._under_way.add(job.id)

    def saw(self, job: Job, event: JobEvent) -> None:
        """See `Observer`."""
        if event.finish is not None and job.id in self._under_way:
            self._under_way.remove(job.id)
            now = self._clock()
            self._gaps.append(now - self._since)
            self._since = now

    def wait(self, waiting: int) -> int:
        """Whole seconds, 1 to 60, after which so many that wait, and one more, have a place.

        The pace is the mean time between the last ends. A gap under way counts once it is longer.
        """
        gaps = tuple(self._gaps)  # another thread adds to them
        open_gap = self._clock() - self._since if self._under_way else 0.0
        mean = sum(gaps) / len(gaps) if gaps else 0.0
        if open_gap > mean:
            mean = (sum(gaps) + open_gap) / (len(gaps) + 1)
        return max(1, min(ceil((waiting + 1) * mean), _LONGEST))

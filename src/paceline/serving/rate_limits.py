"""Rate limits of clients, and estimates of when a request can be admitted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from paceline.serving.messages import Job, JobEvent

_MAX_CLIENTS = 10_000  # buckets kept before full ones are dropped
_KEPT = 32  # number of recent completions used to estimate throughput
_MAX_WAIT = 60  # seconds; OpenAI's clients ignore a longer Retry-After


@dataclass
class Bucket:
    """A token bucket that fills with `rate` a second up to one minute's worth; it may go into debt.

    Attributes:
        rate: per second.
        level: current content; below 0 nothing is granted.
        at: time of `level`, in seconds of the caller's clock.
    """

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """Return a full bucket; it holds at least 1, so that something can be granted at all."""
        return cls(rate, max(60 * rate, 1.0), now)

    def fill(self, now: float) -> None:
        """Fill it up to the time `now`."""
        capacity = max(60 * self.rate, 1.0)
        self.level = min(capacity, self.level + self.rate * max(now - self.at, 0.0))
        self.at = max(now, self.at)

    def wait(self, amount: float) -> float:
        """Return the seconds until it holds `amount`, from the last `fill` on."""
        return max(amount - self.level, 0.0) / self.rate


@dataclass
class RateLimits:
    """The limits of all clients: requests are charged before they run, tokens once they are known.

    Attributes:
        requests: per minute and client; None sets no limit.
        tokens: per minute and client, read or written; cached ones are free. None sets no limit.
    """

    requests: float | None = None
    tokens: float | None = None
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)

    def admit(self, client: str, now: float) -> float:
        """Charge one request; return 0, or the seconds to wait if it is refused."""
        waits = [0.0]
        if self.tokens is not None:  # a debt must be paid off first
            bucket = self._bucket("tokens", client, self.tokens, now)
            waits.append(bucket.wait(1.0) if bucket.level <= 0 else 0.0)
        if self.requests is not None:
            bucket = self._bucket("requests", client, self.requests, now)
            waits.append(bucket.wait(1.0))
            bucket.level -= not any(waits)
        return max(waits)

    def charge(self, client: str, tokens: int, now: float) -> None:
        """Charge tokens that were read or written."""
        if self.tokens is not None:
            self._bucket("tokens", client, self.tokens, now).level -= tokens

    def _bucket(self, kind: str, client: str, rate: float, now: float) -> Bucket:
        if len(self._buckets) > _MAX_CLIENTS:
            for bucket in self._buckets.values():
                bucket.fill(now)
            in_use = [key for key, bucket in self._buckets.items() if bucket.wait(60 * bucket.rate)]
            self._buckets = {key: self._buckets[key] for key in in_use}
        bucket = self._buckets.setdefault((kind, client), Bucket.full(rate / 60, now))
        bucket.fill(now)
        return bucket


class Departures:
    """Estimates waiting times from the rate at which requests end; an `Observer` of a service.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._running: set[str] = set()
        self._since = 0.0  # time of the last end, or of the first request after a pause
        self._gaps: deque[float] = deque(maxlen=_KEPT)

    def on_submit(self, job: Job) -> None:
        """See `Observer`."""
        if not self._running:
            self._since = self._clock()
        self._running.add(job.id)

    def on_event(self, job: Job, event: JobEvent) -> None:
        """See `Observer`."""
        if event.finish is not None and job.id in self._running:
            self._running.remove(job.id)
            now = self._clock()
            self._gaps.append(now - self._since)
            self._since = now

    def wait(self, waiting: int) -> int:
        """Return the seconds, 1 to 60, until `waiting` requests and one more have been admitted.

        The rate is the mean time between the last 32 ends. The time since the last end counts once
        it is longer than that.
        """
        gaps = tuple(self._gaps)  # another thread appends to them
        open_gap = self._clock() - self._since if self._running else 0.0
        mean = sum(gaps) / len(gaps) if gaps else 0.0
        if open_gap > mean:
            mean = (sum(gaps) + open_gap) / (len(gaps) + 1)
        return max(1, min(ceil((waiting + 1) * mean), _MAX_WAIT))

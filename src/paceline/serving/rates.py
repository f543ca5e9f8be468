"""How much each client may ask for in a time: token buckets."""

from __future__ import annotations

from dataclasses import dataclass, field

_MOST = 10_000  # clients that are remembered


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
class Rates:
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

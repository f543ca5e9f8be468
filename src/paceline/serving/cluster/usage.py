"""Carries token usage from the replicas to the one place where rates are limited.

A replica reports the usage since the last report that was charged, as often as it is asked: a lost
report is included in the next one, and none is charged twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.serving.rate_limits import RateLimits


class UsageReport(NamedTuple):
    """The token usage of a replica's clients.

    Attributes:
        replica: its name.
        number: of the report, from 1.
        tokens: of each client, since the last report that was charged.
    """

    replica: str
    number: int
    tokens: dict[str, int]


@dataclass
class UsageMeter(RateLimits):
    """Replica side: records token usage; never rejects."""

    _reported: Counter[str] = field(default_factory=Counter)  # in the last report
    _since: Counter[str] = field(default_factory=Counter)
    _number: int = 0

    def charge(self, client: str, tokens: int, now: float) -> None:
        """See `RateLimits`."""
        if tokens:
            self._since[client] += tokens

    def report(self, replica: str, charged: Mapping[str, int]) -> UsageReport:
        """Return the usage that was not charged yet.

        Args:
            replica: name of this replica.
            charged: number of the last report of each replica that was charged.
        """
        if charged.get(replica) == self._number:
            self._reported.clear()
        self._reported += self._since
        self._since.clear()
        self._number += 1
        return UsageReport(replica, self._number, dict(self._reported))


class UsageLedger:
    """Front side: charges reports.

    Args:
        rates: of all clients.

    Attributes:
        charged: number of the last report of each replica that was charged.
    """

    def __init__(self, rates: RateLimits) -> None:
        self._rates = rates
        self.charged: dict[str, int] = {}

    def take(self, reports: Iterable[UsageReport], now: float) -> None:
        """Charge reports; one that was charged before is ignored."""
        for report in reports:
            if report.number > self.charged.get(report.replica, 0):
                self.charged[report.replica] = report.number
                for client, tokens in report.tokens.items():
                    self._rates.charge(client, tokens, now)

"""What answers cost, on its way from the replicas to the one place where rates are kept.

A replica tells what was used since the bill that was paid last, as often as it is asked: a bill
that is lost comes again with the next, and none is paid twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.serving.rate_limits import RateLimits


class UsageReport(NamedTuple):
    """What the clients of a replica owe.

    Attributes:
        replica: its name.
        number: of the bill, from 1 on.
        tokens: of each client, since the bill that was paid last.
    """

    replica: str
    number: int
    tokens: dict[str, int]


@dataclass
class UsageMeter(RateLimits):
    """At a replica: refuses nobody, and notes what is used."""

    _told: Counter[str] = field(default_factory=Counter)  # on the last bill
    _since: Counter[str] = field(default_factory=Counter)
    _number: int = 0

    def charge(self, client: str, tokens: int, now: float) -> None:
        """See `RateLimits`."""
        if tokens:
            self._since[client] += tokens

    def bill(self, replica: str, paid: Mapping[str, int]) -> UsageReport:
        """What is owed.

        Args:
            replica: this one.
            paid: the number of the bill of each replica that was paid last.
        """
        if paid.get(replica) == self._number:
            self._told.clear()
        self._told += self._since
        self._since.clear()
        self._number += 1
        return UsageReport(replica, self._number, dict(self._told))


class UsageLedger:
    """At the front: takes bills.

    Args:
        rates: of all clients.
    """

    def __init__(self, rates: RateLimits) -> None:
        self._rates = rates
        self.paid: dict[str, int] = {}

    def take(self, bills: Iterable[UsageReport], now: float) -> None:
        """Charge what they say; an old one says nothing new."""
        for bill in bills:
            if bill.number > self.paid.get(bill.replica, 0):
                self.paid[bill.replica] = bill.number
                for client, tokens in bill.tokens.items():
                    self._rates.charge(client, tokens, now)

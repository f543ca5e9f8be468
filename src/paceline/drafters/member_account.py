"""What a member of a blend costs and gains, and so whether it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from paceline.core import Tokens

_SHARE = 0.005  # of all time that a member which gains nothing may cost
_CREDIT = 1.0  # tokens' time that a new member may cost
_MOST = 32.0  # tokens' time that a member may owe to earlier gains
_TRIES = 4  # proposals of a trial after a rest
_OUTLIER = 8.0  # mean costs that one proposal is charged at most: other processes hold it up, too


@dataclass
class MemberAccount:
    """The balance of a member, in seconds: what its proposals saved and cost.

    It begins with the time of a token. Where the balance is spent the member rests, until a share
    of 1/200 of the time that goes by pays for a trial. So a member that never gains anything costs
    a token and 1/200 of the time, and one that gains more than it costs is asked always.

    Attributes:
        balance: in seconds; negative: it cost more than it may.
        cost: of a proposal, a mean over about 20.
        asked: proposals so far.
        resting: whether it is left alone.
        seen: when time went by last.
    """

    balance: float = 0.0
    cost: float = 0.0
    asked: int = 0
    resting: bool = False
    seen: float = float("-inf")

    RATE: ClassVar[float] = 0.05

    def record(self, seconds: float, gained: float, token: float) -> None:
        """Record a proposal.

        Args:
            seconds: that it took.
            gained: tokens that it gained; negative if it lost some.
            token: seconds that a token takes.
        """
        if not self.asked:  # what is made once, at the first proposal, is not held against it
            self.balance += _CREDIT * token
            self.cost = seconds = min(seconds, token)
        self.asked += 1
        seconds = min(seconds, max(_OUTLIER * self.cost, token))
        self.cost += self.RATE * (seconds - self.cost)
        self.balance = min(self.balance + gained * token - seconds, _MOST * token)
        self.resting = self.balance < 0

    def rest(self, seconds: float, now: float) -> None:
        """Let time go by, and wake a member that can pay for a trial.

        Args:
            seconds: of a pass.
            now: time of its end; what passes of several texts share counts once.
        """
        seconds, self.seen = max(min(seconds, now - self.seen), 0.0), now
        enough = _TRIES * self.cost
        if self.balance < enough:
            self.balance = min(self.balance + _SHARE * seconds, enough)
        if self.balance >= enough:
            self.resting = False


def followed(tokens: Tokens, parents: Tokens, drawn: Sequence[int]) -> int:
    """Return how many of the drawn tokens, [L], a tree holds as a path below its root.

    Args:
        tokens: int32 [N], of the tree's nodes; the root comes first.
        parents: int32 [N], of each node; -1 of the root.
        drawn: the tokens behind the root.
    """
    children = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))
    }
    node: int | None = 0
    for count, token in enumerate(drawn):
        node = children.get((node, token)) if node is not None else None
        if node is None:
            return count
    return len(drawn)

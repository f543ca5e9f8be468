"""Pages of keys and values, and how many an engine holds."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 64  # positions of a page of keys and values


@dataclass(frozen=True, slots=True)
class Memory:
    """Pages that hold keys and values of all sequences of an engine, `PAGE` positions each.

    Attributes:
        page_bytes: size of a page.
        used: pages that sequences hold; one that many hold counts once.
        shared: those that more than one sequence holds.
        reserved: pages that are in memory, the empty ones too; never above the limit.
        limit: how many there may be; None: no limit.
    """

    page_bytes: int
    used: int
    shared: int
    reserved: int
    limit: int | None

    @property
    def free(self) -> int | None:
        """Pages that can still be taken; None: any number."""
        return None if self.limit is None else self.limit - self.used

    @staticmethod
    def pages(positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // PAGE)

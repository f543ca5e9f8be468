"""Pages of keys and values, and how many an engine holds."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = 64  # rows of a page of keys and values, in every head of every layer


@dataclass(frozen=True, slots=True)
class Memory:
    """Counts of the pages that hold keys and values of all sequences, `PAGE` rows each.

    Attributes:
        page_bytes: size of a page.
        used: pages that sequences hold; a shared page counts once.
        shared: pages that more than one sequence holds.
        reserved: allocated pages, empty ones included; never above the limit.
        limit: upper limit of allocated pages; None: no limit.
    """

    page_bytes: int
    used: int
    shared: int
    reserved: int
    limit: int | None

    @property
    def free(self) -> int | None:
        """Number of pages that can still be taken; None: any number."""
        return None if self.limit is None else self.limit - self.used

    @staticmethod
    def pages(positions: int) -> int:
        """Return the number of pages for so many rows."""
        return -(-positions // PAGE)

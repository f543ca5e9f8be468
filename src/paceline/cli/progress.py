"""A progress bar on a terminal's stderr: what is done, of how much, how fast and how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@contextmanager
def counting(total: int, what: str = "prompts") -> Iterator[Callable[..., None]]:
    """Show a progress bar over `total` steps; the function it yields advances it.

    Args:
        total: number of steps; 0 if it is not known.
        what: the steps, in the plural.

    Yields:
        a function of the number of steps, and of whether they were done by an earlier run.
    """
    from rich.progress import MofNCompleteColumn

    with _bar(total, what, MofNCompleteColumn()) as tick:
        yield tick


@contextmanager
def counting_bytes(total: int, what: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar over `total` bytes, with the time that is left."""
    from rich.progress import DownloadColumn

    with _bar(total, what, DownloadColumn()) as tick:
        yield tick


@contextmanager
def _bar(total: int, what: str, count: ProgressColumn) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        count,
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total or None, left="")
        skipped = 0

        def tick(steps: int = 1, earlier: bool = False) -> None:
            nonlocal skipped
            bar.advance(task, steps)
            skipped += steps if earlier else 0
            state = bar.tasks[0]
            done = state.completed - skipped
            bar.update(task, left=time_left(done, total - skipped, state.elapsed or 0.0))

        yield tick


def time_left(done: float, total: float, elapsed: float) -> str:
    """Return how long the rest will take at the mean speed so far, in words; empty if unknown."""
    if not done or not total or done >= total:
        return ""
    seconds = round(elapsed * (total - done) / done)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    shown = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return f"{shown} left"

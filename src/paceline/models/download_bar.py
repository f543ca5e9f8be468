"""What a download shows on stderr: a line for each fact, and a bar on a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_INTERVAL = 0.2  # seconds


def note(line: str) -> None:
    """Print a line to stderr, ignoring that nobody may read it."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


class DownloadBar:
    """A bar that grows with the files in a folder.

    Args:
        folder: where the files of the download grow.
        total: bytes in the end.
        done: bytes that arrived before and are kept elsewhere.
    """

    def __init__(self, folder: Path, total: int, done: int = 0) -> None:
        self.folder = folder
        self.total = total
        self.done = done

    @property
    def arrived(self) -> int:
        """Bytes that have arrived so far."""
        return min(self.total, self.done + _folder_size(self.folder))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar meanwhile, if stderr is a terminal."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        ended = threading.Event()
        with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
            task = bar.add_task("", total=self.total, completed=self.done)

            def watch() -> None:
                while not ended.wait(_INTERVAL):
                    bar.update(task, completed=self.arrived)

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
                bar.update(task, completed=self.arrived)
            finally:
                ended.set()
                watcher.join()


def _folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; files may vanish meanwhile."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size if path.is_file() else 0
    return size

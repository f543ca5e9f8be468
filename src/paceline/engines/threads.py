"""How many threads the native engine takes where nobody says."""

from __future__ import annotations

import os
from pathlib import Path

from paceline.errors import MethodError


def default_threads() -> int:
    """Return PACELINE_THREADS, or one thread for each physical core that this process may use.

    Raises:
        MethodError: PACELINE_THREADS is no number.
    """
    requested = os.environ.get("PACELINE_THREADS", "")
    if requested:
        if not requested.isdecimal():
            raise MethodError(f"PACELINE_THREADS is {requested!r}, expected a number of threads")
        return int(requested)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """Return the logical processors that share a core with `cpu`, as the system lists them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text()
    except OSError:
        return str(cpu)

"""How busy others kept the cores while something was measured."""

from __future__ import annotations

import os
from pathlib import Path


def ticks() -> tuple[float, float, float]:
    """Seconds so far: of all cores, of those but idle, of this process; zeros off Linux.

    To this process belong those that it started, once they are over.
    """
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0, 0.0
    seconds = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
    idle = seconds[3] + seconds[4]
    own = os.times()
    return sum(seconds), sum(seconds) - idle, sum(own[:4])


def busy_others(start: tuple[float, float, float], end: tuple[float, float, float]) -> float:
    """Share of the cores' time that went to other processes; 0 where the system does not tell."""
    total, busy, own = (after - before for before, after in zip(start, end, strict=True))
    return max(busy - own, 0.0) / total if total else 0.0

"""Notices that other programs slow a measurement down, and has it repeated."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_SLOWER = 1.5  # times the fastest probe from which the machine counts as busy
_WAITED, _SPARE = 0.15, 0.05  # share of the time, and seconds, that threads may wait for a core
_TRIES = 3
_PATIENCE = 2  # measurements that stay busy after three tries; later ones have one try
_PAUSE = 2.0  # seconds before a measurement is repeated; doubled each time
_NUMBERS = 1 << 19  # of the probe: 4 MB, about a millisecond


def probe_seconds(repeats: int = 7) -> float:
    """Return the mean time of a short fixed piece of work, without the slowest try."""
    numbers = np.ones(_NUMBERS)
    times = []
    for _ in range(repeats):
        start = perf_counter()
        float(np.sqrt(numbers).sum())
        times.append(perf_counter() - start)
    return float(np.mean(sorted(times)[:-1]))


def waited_seconds() -> float:
    """Return how long this process's threads have waited for a core, where the system tells.

    0 elsewhere. Field 2 of schedstat, in nanoseconds (Linux, Documentation/scheduler).
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread that has ended
            total += int(path.read_text().split()[1])
    return total / 1e9


def others_seconds() -> float:
    """Return the seconds of all cores that other programs have taken so far.

    Infinite where the system does not tell. The first line of /proc/stat: user, nice, system, idle,
    iowait, irq, softirq, steal in clock ticks (Linux, Documentation/filesystems/proc.rst).
    """
    try:
        words = Path("/proc/stat").read_text().partition("\n")[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
        ticks = user + nice + system + irq + softirq + steal
        own = os.times()
        seconds = ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
    except (OSError, ValueError, IndexError):
        return float("inf")
    return seconds if ticks else float("inf")


@dataclass
class BusyWatch:
    """Tells whether other programs ran during a measurement, and repeats it.

    Threads that could run and waited for a core tell of other programs, as far as these ran: with
    more threads than cores, as where weights stream from disk, a program waits for itself. Where
    the system does not count that, and for what slows memory down, a probe before and after a
    measurement is compared with the fastest one so far.

    Attributes:
        probe: returns the seconds of the probe.
        waited: returns the seconds that threads have waited for a core so far.
        others: returns the seconds that other programs have taken cores so far.
        clock: seconds.
        pause: waits for so many seconds.
        say: is given a line for the user.
        hurried: returns whether there is no time to repeat anything.
        fastest: seconds of the fastest probe so far.
        repeated: measurements that were made again.
        busy: measurements that were kept although the machine was busy at every try.
    """

    probe: Callable[[], float] = probe_seconds
    waited: Callable[[], float] = waited_seconds
    others: Callable[[], float] = others_seconds
    clock: Callable[[], float] = perf_counter
    pause: Callable[[float], None] = sleep
    say: Callable[[str], None] = lambda line: None
    hurried: Callable[[], bool] = lambda: False
    fastest: float = float("inf")
    repeated: int = 0
    busy: int = 0

    def run(self, what: str, measure: Callable[[], T], better: Callable[[T, T], T]) -> T:
        """Return a measurement, repeated while the machine is busy, at most three times.

        Args:
            what: is measured, for the user.
            measure: makes the measurement.
            better: returns the better of two that were both made on a busy machine.
        """
        kept: T | None = None
        tries = _TRIES if self.busy < _PATIENCE else 1
        for attempt in range(tries):
            result, reason = self._watched(measure)
            if reason is None:
                return result
            kept = result if kept is None else better(kept, result)
            if attempt + 1 < tries:
                if self.hurried():
                    break
                self.repeated += 1
                self.say(f"{reason} while measuring {what}; measuring again")
                self.pause(_PAUSE * 2**attempt)
        self.busy += 1
        if tries > 1:
            self.say(f"the machine stayed busy while measuring {what}; the best try is taken")
        assert kept is not None
        return kept

    def _watched(self, measure: Callable[[], T]) -> tuple[T, str | None]:
        """Return a measurement, and why the machine counted as busy; None if it did not."""
        before, start = self._probe(), self.clock()
        waited, others = self.waited(), self.others()
        result = measure()
        lost, seconds = self.waited() - waited, self.clock() - start
        if math.isfinite(others):
            lost = min(lost, self.others() - others)
        slower = max(before, self._probe()) / self.fastest
        if lost > _WAITED * seconds + _SPARE:
            return result, f"other programs kept this one waiting for {lost:.1f} s"
        if slower > _SLOWER:
            return result, f"the machine is busy ({slower:.1f} times as slow as before)"
        return result, None

    def _probe(self) -> float:
        seconds = self.probe()
        self.fastest = min(self.fastest, seconds)
        return seconds

"""Trainings that are interrupted between two steps."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from paceline.compress.reconstruct.recovery import Recovery

T = TypeVar("T")


class StoppedError(BaseException):
    """Ends a run as a signal would."""


def run_again(monkeypatch: pytest.MonkeyPatch, run: Callable[[], T], at: int = 6) -> tuple[T, int]:
    """Interrupt `run` in a step of its training, and let it go on; every step is kept.

    Returns:
        what it then returns, and the steps that both runs began.
    """
    begun, backwards = [], Recovery._backwards

    def stop(self, rows):
        begun.append(rows)
        if len(begun) == at:
            raise StoppedError
        return backwards(self, rows)

    monkeypatch.setattr(Recovery, "_backwards", stop)
    monkeypatch.setattr("paceline.compress.reconstruct.recovery._KEPT", 0.0)
    with pytest.raises(StoppedError):
        run()
    return run(), len(begun)

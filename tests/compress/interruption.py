"""Trainings that are interrupted between two steps."""

from collections.abc import Callable
from typing import TypeVar

import pytest

from paceline.compress.reconstruct.descent import Descent

T = TypeVar("T")


class StoppedError(BaseException):
    """Ends a run as a signal would."""


def run_again(monkeypatch: pytest.MonkeyPatch, run: Callable[[], T], at: int = 6) -> tuple[T, int]:
    """Interrupt `run` in a step of its training, and let it go on; every step is kept.

    Returns:
        what it then returns, and the steps that both runs began.
    """
    begun, step_by = [], Descent.step_by

    def stop(self, backwards):
        begun.append(backwards)
        if len(begun) == at:
            raise StoppedError
        step_by(self, backwards)

    monkeypatch.setattr(Descent, "step_by", stop)
    monkeypatch.setattr("paceline.compress.reconstruct.recovery._KEPT", 0.0)
    with pytest.raises(StoppedError):
        run()
    return run(), len(begun)

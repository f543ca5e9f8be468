"""When the native engine reads its head in part: measured while it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from paceline import _native
from paceline.engines.screened import ScreenedLogits
from paceline.errors import MethodError

MODES = ("auto", "on", "off")
_VARIABLE = "PACELINE_HEAD_SCREEN"


class HeadScreen:
    """Decides pass by pass whether the coarse head is used, and measures what it saves.

    Plain decoding uses it; requests with drafts only where it is `on`. The copy is made once enough
    passes could have used it, as making it takes the time that some hundred passes save. Then the
    bytes that passes read are compared with the whole head. Where the share stays high (weights
    with outliers, whose bounds are wide), the coarse head rests for longer and longer, and at last
    its copy is freed.

    Args:
        model: holds the head and its copy.
        mode: `auto` as described, `on` from the first pass and for good, `off`; empty reads
            PACELINE_HEAD_SCREEN, or is `auto`.

    Raises:
        MethodError: the mode is unknown.
    """

    SMALLEST = 16 << 20  # bytes of a head; smaller ones stay in a cache
    FIRST = 32  # passes before the copy is made
    TRIAL = 16  # passes before the share is judged
    DEAREST = 0.85  # largest share of the head that pays
    REST = 256  # passes of the first rest
    TRIALS = 3  # before the copy is freed

    def __init__(self, model: _native.NativeModel, mode: str = "") -> None:
        mode = mode or os.environ.get(_VARIABLE, "") or "auto"
        if mode not in MODES:
            raise MethodError(f"{_VARIABLE} is {mode!r}, expected {', '.join(MODES)}")
        self.mode = mode
        self.share: float | None = None
        """Bytes read of the head and its copy over those of the head, mean of recent passes."""
        self._model = model
        self._off = mode == "off" or (mode == "auto" and model.head_bytes < self.SMALLEST)
        self._wait = 0 if mode == "on" else self.FIRST
        self._passes = self._trials = 0
        self._last: _native.NativeScreenedLogits | None = None

    @property
    def bytes(self) -> int:
        """Size of the coarse copy; 0 while there is none."""
        return self._model.screen_bytes

    @property
    def state(self) -> str:
        """`on`, `off` or `waiting`: before its first pass, or at rest."""
        if self._off:
            return "off"
        return "waiting" if self._wait or not self.bytes else "on"

    def ready(self) -> bool:
        """Whether the next pass shall use the coarse head. Called once for each that could."""
        if self._off:
            return False
        self._judge()
        if self._wait:
            self._wait -= 1
            return False
        if self._off or not self._model.make_screen():
            self._off = True
        return not self._off

    def run(self, entries: list[Any], rows: Sequence[bool]) -> ScreenedLogits:
        """Run a pass; see `NativeModel.forward_screened`."""
        self._last = self._model.forward_screened(entries, list(rows))
        return ScreenedLogits(self._last, 0, len(self._last.values))

    def _judge(self) -> None:
        """Account for the last pass: its draws have been made by now."""
        last, self._last = self._last, None
        if last is None:
            return
        model = self._model
        read = model.screen_bytes / model.head_bytes + last.panels_read / model.head_panels
        self._passes += 1
        rate = max(0.05, 1 / self._passes)
        self.share = read if self.share is None else self.share + rate * (read - self.share)
        if self.mode == "on" or self._passes < self.TRIAL or self.share <= self.DEAREST:
            return
        self._passes, self._trials = 0, self._trials + 1
        self._wait = self.REST << 2 * (self._trials - 1)
        if self._trials == self.TRIALS:
            self._off = True
            model.drop_screen()

"""Lets an engine decide about the coarse copy of its head before anything is timed or counted.

The native engine makes it after some 30 plain passes, which takes as long as tens of passes, and
keeps it in memory: see `engines.head_screen`.
"""

from __future__ import annotations

import numpy as np

from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.engines.head_screen import HeadScreen


def settle_head(engine: Engine) -> int:
    """Run as many passes as it takes until the copy is made; return its bytes, 0 without one."""
    screen = getattr(engine, "head_screen", None)
    if not isinstance(screen, HeadScreen):
        return 0
    if screen.state == "waiting" and not screen.bytes:
        sequence = engine.start(np.zeros(1, np.int32))
        root = TokenTree.chain(np.zeros(1, np.int32))
        try:
            for _ in range(HeadScreen.FIRST + 1):
                engine.forward_screened([(sequence, root)], [True])
        finally:
            engine.release(sequence)
    return screen.bytes

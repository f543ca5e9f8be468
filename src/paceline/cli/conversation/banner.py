"""What a chat says first: the model, its format, threads and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.lm import LM


def banner(lm: LM) -> str:
    """Return two lines: what talks here and how fast, and which keys there are."""
    engine = lm.engine
    parts = [lm.model.name, f"{engine.format} weights", f"{engine.kv_format} keys and values"]
    if engine.threads is not None:
        parts.append(f"{engine.threads} thread{'s' if engine.threads != 1 else ''}")
    if engine.device is not None:
        parts.append(str(engine.device))
    speed = plain_speed(lm)
    if speed is not None:
        parts.append(f"about {speed:.0f} tokens/s plain")
    keys = "/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the talk"
    return f"{' · '.join(parts)}\n{keys}"


def plain_speed(lm: LM) -> float | None:
    """Return tokens per second of plain decoding, if the governor has measured it."""
    from paceline.decoding.governor import Governor

    if not isinstance(lm.budget, Governor):
        return None
    return 1 / float(lm.budget.cost.seconds[0])

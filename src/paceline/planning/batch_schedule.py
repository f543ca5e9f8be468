"""Predicts how long a batch of several users takes, pass by pass, as the server schedules it.

All requests arrive at once. The first pass has no streams and reads up to 256 prompt tokens, the
shortest prompts first; whoever has read its prompt decodes. From then on a pass carries only as
many prompt tokens as it takes to become twice as long (Sarathi-Serve, arXiv 2403.02310; at least
8), so that the other users wait while the first ones answer already, and the last ones answer
nearly alone. With 8 users and prompts of 60 tokens, 5 streams share a pass of the model in the
mean, not 8. A prompt token has no logits: it takes less time than a node of a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.serving.pass_budget import fitting_tokens

MAX_STREAMS = 32  # requests of a batch that run at once, as `serving.offline` has it
MAX_USERS = 64  # that are followed one by one; more take proportionally longer
_SLOWDOWN = 2.0  # of a pass by prompt tokens, as the server's default has it


class StreamPass(NamedTuple):
    """A pass in which some users decode.

    Attributes:
        seconds: that it takes without prompt tokens.
        gained: tokens of each user.
    """

    seconds: float
    gained: float


def batch_seconds(
    prompts: Sequence[int],
    answer: int,
    stream_pass: Callable[[int], StreamPass],
    prompt_token: float,
    prompt_room: Callable[[int], int],
) -> float:
    """Return the seconds until all answers are complete.

    Args:
        prompts: tokens of the prompt of each user.
        answer: tokens of each answer.
        stream_pass: describes a pass by the number of users that decode in it.
        prompt_token: seconds that a prompt token adds to a pass.
        prompt_room: returns how many prompt tokens a pass reads beside so many streams.
    """
    scale = max(len(prompts) / MAX_USERS, 1.0)
    waiting = [max(size - 1, 0) for size in prompts[:MAX_USERS]]  # the last token starts the answer
    admitted: list[int] = []
    streams: list[float] = []  # tokens that each user still waits for
    seconds = 0.0
    while waiting or admitted or streams:
        while waiting and len(admitted) + len(streams) < MAX_STREAMS:
            admitted.append(waiting.pop(0))
        admitted.sort()
        count = len(streams)
        room = prompt_room(count) if admitted else 0
        own = stream_pass(count) if count else StreamPass(0.0, 1.0)
        passes = _equal_passes(admitted, streams, room, own.gained)
        seconds += passes * (own.seconds + prompt_token * min(room, sum(admitted)))
        streams = [left - passes * own.gained for left in streams]
        streams = [left for left in streams if left > 1e-9]
        streams += _read(admitted, passes * room, answer)
    return scale * seconds


def _equal_passes(
    admitted: Sequence[int], streams: Sequence[float], room: int, gained: float
) -> int:
    """Return how many passes have the same streams and as many prompt tokens."""
    ends = [ceil(min(streams) / gained - 1e-9)] if streams else []
    if admitted:
        ends.append(max(admitted[0] // room, 1))
    return max(min(ends), 1)


def _read(admitted: list[int], tokens: int, answer: int) -> list[float]:
    """Read prompt tokens, the shortest prompt first; return the answers that begin now."""
    begun = []
    while admitted and admitted[0] <= tokens:
        tokens -= admitted.pop(0)
        begun.append(float(answer))
    if admitted:
        admitted[0] -= tokens
    return begun


@lru_cache(4096)
def prompt_room(nodes: tuple[int, ...], seconds: tuple[float, ...], streams: int) -> int:
    """Return how many prompt tokens a pass reads beside so many streams, by the curve T(n)."""

    def curve(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.interp(sizes, nodes, seconds) * np.maximum(sizes / nodes[-1], 1.0)

    return fitting_tokens(curve, streams, _SLOWDOWN)

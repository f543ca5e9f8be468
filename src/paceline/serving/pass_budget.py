"""How many tokens a pass may carry besides its trees, so that no stream waits for long.

Parts of prompts (Sarathi-Serve, arXiv 2403.02310), and what drafts and guides must read of a text
before they can be used, come from one budget: each token at the price of its model.
"""

from __future__ import annotations

import numpy as np

from paceline.decoding.governor import Governor
from paceline.engines.base import Engine

CHUNK = 256  # tokens of prompts in a pass that nobody waits for, and most that a model reads
_LEAST = 8  # tokens of prompts in a pass that somebody waits for


def prefill_tokens(governor: Governor, streams: int, prefill_slowdown: float) -> int:
    """Tokens of prompts that a pass with so many streams may carry.

    Args:
        governor: knows how long passes take.
        streams: requests that get a tree.
        prefill_slowdown: the pass may take so many times as long as without.
    """
    if not streams:
        return CHUNK
    sizes = np.arange(1, CHUNK + 1)
    slow = governor.seconds(streams + sizes) > prefill_slowdown * governor.seconds(streams)
    return max(int(slow.argmax()), _LEAST) if slow.any() else CHUNK


def price(engine: Engine, target: Engine) -> float:
    """What a token costs in an engine, in tokens of the target: by the size of their weights."""
    own, other = engine.weight_bytes, target.weight_bytes
    return own / other if own and other else 1.0


class PassBudget:
    """What drafts and guides may still read in a pass.

    Args:
        tokens: that the pass may carry.
        alone: nobody else waits: parts of prompts leave as much to models besides.
    """

    def __init__(self, tokens: int, alone: bool) -> None:
        self._alone, self._left = alone, float(CHUNK if alone else tokens)
        self._promised = _LEAST

    def part(self, size: int, cost: float) -> int:
        """Of a part of a prompt, as many tokens as may be run where they cost so much more."""
        if self._alone:
            return size
        fitting = max(int(size / (1.0 + cost)), min(size, _LEAST))
        self._left -= fitting * (1.0 + cost)
        return fitting

    def may(self, cost: float) -> int:
        """Tokens that may be read at this cost for each."""
        return min(max(int(self._left / cost), 0), CHUNK) if cost else CHUNK

    def must(self, cost: float) -> int:
        """As `may`, but somebody can always go on."""
        found = max(self.may(cost), self._promised)
        self._promised = 0
        return found

    def spend(self, tokens: int, cost: float) -> None:
        """So many were read at this cost for each."""
        self._left -= tokens * cost

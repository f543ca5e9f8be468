"""Warm start: drafters learn from a model's recorded generations before the first request."""

from __future__ import annotations

import numpy as np

from paceline.core import Request, State, Step, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.models.trace import Trace

_CHUNK = 64  # tokens observed at once


def replay(trace: Trace, drafter: Drafter) -> None:
    """Replay recorded generations through `drafter.observe`, as if it had drafted them."""
    k = min(drafter.top_k, trace.top_tokens.shape[1])
    for text in trace.texts():
        tokens = trace.tokens[text]
        drafter.begin(Request(prompt=(int(tokens[0]),), max_new_tokens=len(tokens)))
        # What followed the last token is not recorded: take the most likely token.
        drawn = np.append(tokens[1:], trace.top_tokens[text][-1, :1])
        for at in range(0, len(tokens), _CHUNK if k else len(tokens)):
            here = slice(at, at + _CHUNK)
            tree = TokenTree.chain(tokens[here])
            drafter.observe(
                Step(
                    tokens[: at + 1],
                    tree,
                    trace.top_tokens[text][here, :k],
                    trace.top_probs[text][here, :k],
                    np.arange(len(tree), dtype=np.int32),
                    drawn[here],
                )
            )
        drafter.propose(tokens, 0)  # drafters that index the text index all of it


def start_of(drafter: Drafter, target: Target, warm: bool) -> State:
    """Replay the target's trace if there is one and `warm`; return the state, else an empty one."""
    if not warm or target.trace is None:
        return {}
    replay(target.trace, drafter)
    return drafter.state()

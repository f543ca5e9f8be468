"""What a model thought while it wrote something: a start for drafters that learn from it."""

from __future__ import annotations

import numpy as np

from paceline.core import Request, State, Step, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.models.trace import Trace

_CHUNK = 64  # tokens observed at once


def replay(trace: Trace, drafter: Drafter) -> None:
    """Let a drafter live through the texts as if it had been there when they were written."""
    k = min(drafter.top_k, trace.top_tokens.shape[1])
    for text in trace.texts():
        tokens = trace.tokens[text]
        drafter.begin(Request(prompt=(int(tokens[0]),), max_new_tokens=len(tokens)))
        # After the last token comes, for all that is known, the likeliest.
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
        drafter.propose(tokens, 0)  # those that read the text read it to its end


def start_of(drafter: Drafter, target: Target, warm: bool) -> State:
    """Where a drafter starts from, which becomes its state; empty without a trace or a wish."""
    if not warm or target.trace is None:
        return {}
    replay(target.trace, drafter)
    return drafter.state()

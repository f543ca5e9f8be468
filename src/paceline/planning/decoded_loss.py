"""The loss of a text of which every token is decoded, not read as a prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.kvcache.base import Policy
from paceline.scoring import token_logprobs

_DECODED = 16  # tokens of a pass whose tokens each choose what they read


def decoded_nats(
    engine: Engine, policy: Policy | None, window: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return the nats of window[1:] as if all of it were decoded, float64.

    A KV policy bounds the cache, or none does; an attention pattern of the engine chooses what each
    token reads.
    """
    sequence = engine.open()
    nats = []
    try:
        if policy is not None:
            policy.begin(engine, sequence)
        at, end = 0, len(window) - 1
        while at < end:
            size = min(_DECODED if policy is None else policy.distance(at), end - at)
            tree = TokenTree.chain(window[at : at + size])
            logits = engine.forward([(sequence, tree)])
            nats.append(-token_logprobs(logits, window[at + 1 : at + 1 + size]))
            engine.commit(sequence, np.arange(size))
            if policy is not None:
                policy.act(engine, sequence)
            at += size
    finally:
        engine.release(sequence)
    return np.concatenate(nats)

"""LServe: some heads read the first and the last positions alone, the others choose pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.attention.base import RunPattern
from paceline.compatibility import check_needs
from paceline.core import Exactness, Floats
from paceline.engines.few_read import FewRead, HeadRead
from paceline.registry import Source, check_range, patterns

if TYPE_CHECKING:
    from paceline.engines.base import Engine

_COPY = 128  # tokens of the random text that is read twice


@patterns.register("lserve", Exactness.LOSSY)
@dataclass(frozen=True)
class LServe(RunPattern):
    """Turn a share of the heads into streaming ones; let the others choose pages as Quest does.

    Streaming heads read `sinks` and `local` positions alone. They are the KV heads that look back
    least where a random text comes again, which is measured once, when the model is opened.

    Attributes:
        streaming: share of the KV heads that stream. Default 0.5.
        share, least, sinks, local, dense: as of `RunPattern`; `dense` layers stream nothing.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.KEYS, Ability.QUERIES})
    source = Source(
        authors="Yang et al.",
        title="LServe",
        arxiv="2502.14866",
        section="3",
        note="heads are told apart by a copied random text, not by trained gates; pages of 16 are "
        "chosen without larger ones above them",
    )
    catalogue = (321,)
    missing = {321: "streaming heads in prefill, and pages in two levels"}
    examples = ("lserve", "lserve:streaming=0.25,share=0.2,local=128")

    streaming: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 1, self.name, streaming=self.streaming)

    @property
    def few_read(self) -> FewRead:
        """See `RunPattern`."""
        return self.rule("bounds")

    def head_reads(self, engine: Engine) -> list[list[int]]:
        """Let the heads stream that copy least; of equals the earlier."""
        check_needs(f"the attention pattern {self.name}", self.needs, engine.name, engine.abilities)
        reads = super().head_reads(engine)
        places = [(i, g) for i in range(self.dense, len(reads)) for g in range(len(reads[i]))]
        if not self.streaming or not places:
            return reads
        scores = copying_heads(engine)
        places.sort(key=lambda place: scores[place[0]][place[1]])
        for layer, head in places[: round(self.streaming * len(places))]:
            reads[layer][head] = HeadRead.NEAR
        return reads


def copying_heads(engine: Engine) -> list[NDArray[np.float64]]:
    """Return how much each KV head looks at the first copy of a random text from the second.

    Returns:
        for each layer the largest share of attention among the query heads of a group, mean over
        positions, float64 [H_kv].
    """
    size = max(1, min(_COPY, engine.config.context // 4))
    drawn = np.random.default_rng(0).integers(0, engine.config.vocab_size, 3 * size)
    text = np.r_[drawn, drawn[size : 2 * size]].astype(np.int32)  # filler, text, filler, text
    sequence = engine.open()
    try:
        engine.track_queries(sequence, size)
        engine.extend(sequence, text)
        return [
            _looks_back(engine.recent_queries(sequence, index), keys, size)
            for index in range(len(engine.config.layers))
            for keys, _ in [engine.keys_values(sequence, index)]
        ]
    finally:
        engine.release(sequence)


def _looks_back(queries: Floats, keys: Floats, size: int) -> NDArray[np.float64]:
    """Return the attention of the last `size` queries to the copied text, [H_kv]."""
    if not len(keys):
        return np.empty(0)
    group = len(queries) // len(keys)
    scores = np.einsum("hwd,hsd->hws", queries, keys.repeat(group, 0)).astype(np.float64)
    at = np.arange(keys.shape[1] - size, keys.shape[1])
    scores[:, np.arange(keys.shape[1]) > at[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    copied = weights[..., size : 2 * size].sum(-1).mean(-1)  # [H]
    return np.asarray(copied.reshape(len(keys), group).max(1), np.float64)

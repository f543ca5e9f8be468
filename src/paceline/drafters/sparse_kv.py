"""Self-speculation with a part of the KV cache, for long contexts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness, Tokens
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.draft_model.self_draft import SelfDrafter, viewable
from paceline.engines.view import View
from paceline.registry import Source, check_range, drafters

_BLOCK = 16  # aligned positions that are retrieved together: what a view reads fastest
_QUERY = 32  # last tokens whose pairs select blocks


@drafters.register("sparse_kv", Exactness.EXACT, aliases=("partial",))
@dataclass(frozen=True, kw_only=True)
class SparseKV(DraftSettings):
    """Draft with a small part of a long text in view, and verify with all of it.

    A draft pass attends to the first `sinks` positions, the last `recent`, and `retrieved` more:
    blocks that share the rarest pairs of tokens with the last 32 tokens. The weights are read in
    full, so this pays only where reading the cache takes longer than reading them, or where few
    nodes a pass are cheap: nothing is drafted before the text has `least` times as many tokens as a
    draft pass attends to. The tree grows as that of `model`.

    State: as `model`. Cost of a proposal: up to `depth` passes of the model with a short cache.
    Good for: texts of many thousand tokens.

    Based on Wu et al., TokenSwift, arXiv 2502.18890, which selects positions by attention.

    Attributes:
        sinks: positions at the beginning, on which models rest their attention. Default 16.
        recent: positions at the end. Default 512.
        retrieved: positions between them, rounded down to blocks of 16. Default 512.
        least: how many times longer than the draft's view the text must be. Default 4.
        depth: as of `model`. Default 4: each pass reads all weights.
        threshold: as of `model`. Default 0.5: a pass costs a good part of the model's.
        width, stop, rate: as of `model`.
    """

    source = Source(authors="Wu et al.", title="TokenSwift", arxiv="2502.18890")
    catalogue = (113,)
    missing = {113: "trained heads, retrieval by attention, frequent n-grams and the penalty"}
    examples = ("sparse_kv", "sparse_kv:sinks=2,recent=4,retrieved=16,least=1.0")

    sinks: int = 16
    recent: int = 512
    retrieved: int = 512
    least: float = 4.0
    depth: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = 1 << 20
        check_range(0, limit, "sparse_kv", sinks=self.sinks, retrieved=self.retrieved)
        check_range(1, limit, "sparse_kv", recent=self.recent)
        check_range(1.0, limit, "sparse_kv", least=self.least)

    def build(self, target: Target) -> Drafter:
        """Return a drafter on the target's engine.

        Raises:
            MethodError: the engine cannot leave out positions.
        """
        return _SparseKV(self, viewable(target, "sparse_kv", "positions"))


class _SparseKV(SelfDrafter):
    origins = ("sparse_kv",)
    needs = frozenset({Ability.POSITIONS})
    _method: SparseKV

    def view(self, context: Tokens) -> View | None:
        method, length = self._method, len(context) - 1
        seen = method.sinks + method.recent + method.retrieved
        if length < method.least * seen:
            return None
        return View(positions=chosen(context, method.sinks, method.recent, method.retrieved))


def chosen(context: Tokens, sinks: int, recent: int, retrieved: int) -> Tokens:
    """Return the positions of `context` [S] that a draft pass attends to, increasing.

    The first and the last ones, and blocks between them; the last token is not among them. A pair
    of tokens that also occurs in the last 32 tokens adds one over its count to its block's weight.
    """
    length = len(context) - 1
    seen = np.zeros(length, bool)
    seen[:sinks] = True
    seen[max(length - recent, 0) :] = True
    blocks = length // _BLOCK
    if retrieved >= _BLOCK and blocks:
        pairs = context[:-1].astype(np.int64) << 32 | context[1:]
        _, kind, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        wanted = np.zeros(len(counts), bool)
        wanted[kind[-_QUERY:]] = True
        worth = (wanted / counts)[kind][: blocks * _BLOCK].reshape(blocks, _BLOCK).sum(1)
        worth[seen[: blocks * _BLOCK].reshape(blocks, _BLOCK).all(1)] = -1.0
        best = np.argsort(-worth, kind="stable")[: retrieved // _BLOCK]
        for block in best[worth[best] > 0].tolist():
            seen[block * _BLOCK : (block + 1) * _BLOCK] = True
    return np.flatnonzero(seen).astype(np.int32)

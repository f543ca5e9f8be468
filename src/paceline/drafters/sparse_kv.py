"""Self-speculation with a part of the cached text, for long contexts."""

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
_ASKING = 32  # last tokens whose pairs say what is wanted


@drafters.register("sparse_kv", Exactness.EXACT, aliases=("partial",))
@dataclass(frozen=True, kw_only=True)
class SparseKV(DraftSettings):
    """The model drafts seeing little of a long text, and checks seeing all of it.

    A draft pass sees the first `sinks` positions, the last `recent`, and `retrieved` more: blocks
    that share the rarest pairs of tokens with the last 32. TokenSwift picks them by attention,
    which engines do not tell; its heads need training and are left out. As the weights are read
    in full, this pays only where reading the cache takes longer than reading them, or where few
    nodes a pass are cheap: nothing is guessed before the text has `least` times as many tokens as
    a draft pass sees. The tree grows as that of `model`.

    State: as `model`. Cost of a proposal: up to `depth` passes of the model with a short cache.
    Good for: texts of many thousand tokens.

    Attributes:
        sinks: positions at the beginning, which models rest their attention on. Default 16.
        recent: positions at the end. Default 512.
        retrieved: positions between them, rounded down to blocks of 16. Default 512.
        least: how many times longer than the draft's view the text must be. Default 4.
        width: nodes that each draft pass adds. Default 4.
        depth: most draft passes for a proposal. Default 4: each reads all weights.
        stop: `confidence`, `bandit` or `depth`, as of `model`.
        threshold: of `confidence`. Default 0.5.
        rate: of learning the sharpness. Default 0.02.
    """

    source = Source(authors="Wu et al.", title="TokenSwift", arxiv="2502.18890")
    catalogue = (113,)
    missing = {113: "trained heads, retrieval by attention, frequent n-grams and the penalty"}

    sinks: int = 16
    recent: int = 512
    retrieved: int = 512
    least: float = 4.0
    depth: int = 4
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 << 20
        check_range(0, most, "sparse_kv", sinks=self.sinks, retrieved=self.retrieved)
        check_range(1, most, "sparse_kv", recent=self.recent)
        check_range(1.0, most, "sparse_kv", least=self.least)

    def build(self, target: Target) -> Drafter:
        """A drafter on the target's engine."""
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
    """Positions of `context` [S], its last token apart, that a draft pass sees; increasing.

    The first and the last ones, and blocks between them. A pair of tokens that stands in the last
    32 tokens, too, counts for its block by one over how often it stands in the text.
    """
    length = len(context) - 1
    seen = np.zeros(length, bool)
    seen[:sinks] = True
    seen[max(length - recent, 0) :] = True
    blocks = length // _BLOCK
    if retrieved >= _BLOCK and blocks:
        pairs = context[:-1].astype(np.int64) << 32 | context[1:]
        _, kind, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        asked = np.zeros(len(counts), bool)
        asked[kind[-_ASKING:]] = True
        worth = (asked / counts)[kind][: blocks * _BLOCK].reshape(blocks, _BLOCK).sum(1)
        worth[seen[: blocks * _BLOCK].reshape(blocks, _BLOCK).all(1)] = -1.0
        best = np.argsort(-worth, kind="stable")[: retrieved // _BLOCK]
        for block in best[worth[best] > 0].tolist():
            seen[block * _BLOCK : (block + 1) * _BLOCK] = True
    return np.flatnonzero(seen).astype(np.int32)

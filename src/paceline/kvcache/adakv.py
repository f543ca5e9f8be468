"""AdaKV: the heads of a layer share its budget, by the scores of another policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.engines.base import Engine
from paceline.errors import MethodError
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy, parse_policy
from paceline.registry import Source, check_range, kv_policies


@kv_policies.register("adakv", Exactness.LOSSY)
@dataclass(frozen=True)
class AdaKV(ScoringPolicy):
    """Let heads whose attention is spread out keep more rows than others of their layer.

    The best rows of a layer stay whichever head they belong to, as another policy scores them;
    each head keeps a share of its budget in any case. Heads attend to the rows that they hold
    alone. A page of the cache holds rows of all heads, so that memory follows the largest one.

    Attributes:
        budget: rows that the heads of a layer keep on average. Default 1024.
        sinks: first positions that are always kept. Default 4.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64.
        of: name of the policy that scores; its own settings are the defaults. Default
            expected_attention.
        own: share of the budget that a head keeps for its own best rows, 0 to 1. Default 0.2, as
            in the paper.
        most: a head keeps at most so many times the budget, 1 to 64. Default 3; the paper has no
            such limit.
    """

    source = Source(
        authors="Feng et al.",
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient "
        "LLM Inference",
        arxiv="2407.11550",
        section="algorithm 1",
    )
    examples = ("adakv", "adakv:budget=24,recent=8,every=8,of=keydiff", "adakv:of=snapkv")

    recent: int = 64
    of: str = "expected_attention"
    own: float = 0.2
    most: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 1.0, self.name, own=self.own)
        check_range(1.0, 64.0, self.name, most=self.most)
        self.scorer  # noqa: B018 (refuses a bad name)

    @property
    def scorer(self) -> ScoringPolicy:
        """The policy that scores.

        Raises:
            MethodError: there is no such policy, or it does not score rows.
        """
        policy = parse_policy(self.of)
        if not isinstance(policy, ScoringPolicy) or isinstance(policy, AdaKV):
            raise MethodError(
                f"{self.name}:of is {self.of!r}, which does not score rows; take e.g. "
                "expected_attention, snapkv or keydiff"
            )
        return replace(
            policy, budget=self.budget, sinks=self.sinks, every=self.every, recent=self.recent
        )

    @property
    def required(self) -> frozenset[Ability]:
        """Return what this policy and the one that scores need."""
        return self.needs | self.scorer.required

    @property
    def query_window(self) -> int:
        """Last positions whose queries are read."""
        return self.scorer.query_window

    def check(self, engine: Engine) -> None:
        """Refuse what the policy that scores refuses; see `Policy.check`."""
        super().check(engine)
        self.scorer.check(engine)

    def max_rows(self, length: int) -> int:
        """Return the most rows of the largest head."""
        return min(length, int(self.budget * self.most) + self.every)

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        return self.scorer.score(layer)

    def head_budgets(self, layer: LayerCache, scores: Scores) -> NDArray[np.int64]:
        """Return how many of a layer's best rows each head has."""
        heads, rows = scores.shape
        order = np.argsort(-scores, axis=1, kind="stable")
        safe = np.array(scores)
        np.put_along_axis(safe, order[:, : int(self.budget * self.own)], np.inf, 1)
        safe[scores == -np.inf] = -np.inf
        best = np.argsort(-safe, axis=None, kind="stable")[: self.budget * heads]
        counts = np.bincount(best // rows, minlength=heads)
        return np.minimum(counts, int(self.budget * self.most))

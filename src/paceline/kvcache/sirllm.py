"""SirLLM: rows by how surprising their token was, which fades with time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness
from paceline.kvcache.base import LayerCache, Scores, ScoringPolicy
from paceline.registry import Source, check_range, kv_policies

_SPAN = 1024  # positions for which `decay` is given


@kv_policies.register("sirllm", Exactness.LOSSY)
@dataclass(frozen=True)
class SirLLM(ScoringPolicy):
    """Keep the tokens that the model did not expect.

    A row's score is the surprisal of its token, -log p given the tokens before it, as it was when
    the token was read, times `decay` for every 1024 positions since. All heads of all layers keep
    the same positions. The surprisal of a prompt needs the logits of all its tokens, so that its
    reading costs the head's products too: about a quarter more on a small model with a large
    vocabulary.

    Attributes:
        budget: rows that each head keeps. Default 1024, as of other policies.
        sinks: first positions that are always kept. Default 4, as in the paper.
        every: committed positions between evictions. Default 64.
        recent: last positions, always kept. Default 64, as of other policies.
        decay: factor for every 1024 positions since a token was read, 0 to 1. Default 1: nothing
            fades; in endless dialogues less keeps new phrases before old ones.
    """

    source = Source(
        authors="Yao et al.",
        title="SirLLM: Streaming Infinite Retentive LLM",
        arxiv="2405.12528",
        section="section 3",
        note="decays by position, where the paper does at each turn of a dialogue; positions stay "
        "those of the text",
    )
    catalogue = (37,)
    needs = frozenset({Ability.EVICT, Ability.SURPRISAL})
    examples = ("sirllm", "sirllm:budget=24,recent=8,every=8,decay=0.5")

    recent: int = 64
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0.0, 1.0, self.name, decay=self.decay)

    def score(self, layer: LayerCache) -> Scores:
        """See `ScoringPolicy.score`."""
        assert layer.surprisal is not None
        scores: Scores = layer.surprisal[layer.positions]
        ages = (layer.length - layer.positions) / _SPAN
        return scores * np.power(self.decay, ages)

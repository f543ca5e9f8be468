"""Random trees, for tests: a drafter can cost time, never correctness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paceline.core import Exactness, Tokens, TokenTree
from paceline.drafters.base import Drafter, DraftMethod, Target
from paceline.errors import MethodError
from paceline.registry import Source, drafters


@drafters.register("hostile", Exactness.EXACT, hidden=True)
@dataclass(frozen=True)
class Hostile(DraftMethod):
    """Propose valid trees of any shape and size, with random tokens and random scores.

    State: none. Cost of a proposal: linear in the budget.
    Good for: tests only.

    Attributes:
        seed: of the random numbers, 0 or more. Default 0: a failure repeats.
    """

    source = Source()
    examples = ("hostile",)

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise MethodError(f"hostile:seed is {self.seed}, expected 0 or more")

    def build(self, target: Target) -> Drafter:
        """Return a drafter of random trees over the vocabulary."""
        return _Hostile(self.seed, target.vocab_size)


class _Hostile(Drafter):
    origins = ("hostile",)

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed = seed
        self._vocab_size = vocab_size
        self.reset()

    def reset(self) -> None:
        self._random = np.random.default_rng(self._seed)

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        random = self._random
        tokens, parents, edges = [int(context[-1])], [-1], set()
        bushy = random.random()  # 0 gives chains, 1 gives bushes
        for _ in range(random.integers(0, budget, endpoint=True)):
            last = len(tokens) - 1
            parent = (
                int(random.integers(0, last, endpoint=True)) if random.random() < bushy else last
            )
            token = int(random.integers(0, self._vocab_size))
            if (parent, token) not in edges:
                edges.add((parent, token))
                tokens.append(token)
                parents.append(parent)
        scores = random.random(len(tokens), np.float32)
        origin = np.zeros(len(tokens), np.int16)
        origin[0] = -1
        return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), scores, origin)

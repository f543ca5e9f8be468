"""Contrastive search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.control.logits import softmax
from paceline.core import Exactness, Floats, Tokens, TokenTree
from paceline.decoding.strategies.base import SearchOutput, Strategy, Task
from paceline.decoding.strategies.hypotheses.search import Search
from paceline.decoding.walk import edited
from paceline.errors import MethodError
from paceline.registry import Source, check_range, strategies


@strategies.register("contrastive", Exactness.LOSSY)
@dataclass(frozen=True)
class ContrastiveSearch(Strategy):
    """Take one of the `k` most likely tokens that is likely and unlike what came before.

    The value of a token is (1 - penalty) * probability - penalty * similarity, where the similarity
    is the largest cosine between its hidden state and that of any token before it, prompt included.
    The candidates are the children of one tree, so one pass gives the states of all of them and the
    logits after each. Probabilities are those after the controls. The score of an output is the
    mean value of its tokens.

    Cost: a pass over `k` + 1 nodes for each token, and the prompt's rows in the prefill.
    Memory: one hidden state for each position.
    Good for: open-ended text that neither repeats nor drifts, with models whose hidden states
    differ enough from token to token.

    Attributes:
        k: number of candidates, 1 to 256. Default 4.
        penalty: the paper's alpha, 0 to 1; 0 is greedy. Default 0.6.
    """

    k: int = 4
    penalty: float = 0.6

    examples = ("contrastive", "contrastive:k=3,penalty=0.4")
    source = Source(
        authors="Su et al.",
        title="A Contrastive Framework for Neural Text Generation",
        arxiv="2202.06417",
    )
    needs = frozenset({Ability.HIDDEN})

    def __post_init__(self) -> None:
        check_range(1, 256, self.name, k=self.k)
        check_range(0, 1, self.name, penalty=self.penalty)

    def run(self, task: Task) -> list[SearchOutput]:
        """Return one output."""
        self.check(task)
        engine = task.engine
        if "hidden" not in engine.abilities:
            raise MethodError(
                f"contrastive needs hidden states, and the engine {engine.name} gives none"
            )
        tokens: list[int] = []
        total_value, ended = 0.0, False
        with Search(task) as search:
            states = _States(engine.config.hidden_size, engine.config.context)
            live = search.start(lambda _, __, ___: states.add(engine.hidden()))
            row: Floats = search.next_logits([live])[0].copy()
            states.add(engine.hidden())
            root = live.history[-1]
            while len(tokens) < task.limit and not ended:
                probs = softmax(edited(row, live.history, search.request))
                candidates = np.argsort(-probs, kind="stable")[: self.k].astype(np.int32)
                candidates = candidates[probs[candidates] > 0]
                rows = search.forward([(live, _fan(root, candidates))])
                fresh = engine.hidden()[1:]
                similar = [states.nearest(state) for state in fresh]
                values = (1 - self.penalty) * probs[candidates] - self.penalty * np.array(similar)
                pick = int(values.argmax())
                engine.commit(live.sequence, [0])
                states.add(fresh[pick : pick + 1])
                root = int(candidates[pick])
                total_value += float(values[pick])
                tokens.append(root)
                live.history.append(root)
                row = search.guided(live, rows[1 + pick].copy())
                ended = task.ends(tokens)
        return [search.output(tokens, total_value / max(len(tokens), 1), ended)]


class _States:
    """Unit vectors of every position so far."""

    def __init__(self, width: int, context: int) -> None:
        self._rows = np.zeros((64, width))
        self._count, self._most = 0, context

    def add(self, states: Floats) -> None:
        """Append the states of the next positions, [N, hidden]."""
        end = self._count + len(states)
        if end > len(self._rows):
            grown = np.zeros((max(end, min(2 * len(self._rows), self._most)), states.shape[1]))
            grown[: self._count] = self._rows[: self._count]
            self._rows = grown
        for row in states:  # one by one, so that the bits do not depend on how many come at once
            self._rows[self._count] = _unit(row)
            self._count += 1

    def nearest(self, state: Floats) -> float:
        """Return the largest cosine of `state` with any of them."""
        products = np.einsum("sh,h->s", self._rows[: self._count], _unit(state))
        return float(products.max())


def _unit(state: Floats) -> NDArray[np.float64]:
    wide = state.astype(np.float64)
    unit: NDArray[np.float64] = wide / max(float(np.sqrt((wide * wide).sum())), 1e-30)
    return unit


def _fan(root: int, children: Tokens) -> TokenTree:
    """Return the tree of a root and its children."""
    n = len(children)
    parents = np.zeros(n + 1, np.int32)
    parents[0] = -1
    origin = np.zeros(n + 1, np.int16)
    origin[0] = -1
    tokens = np.concatenate([np.array([root], np.int32), children])
    return TokenTree(tokens, parents, np.ones(n + 1, np.float32), origin)

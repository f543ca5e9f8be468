"""A language model without a model: the next logits are a hash of the last tokens."""

import itertools
from dataclasses import dataclass, field

import numpy as np

from paceline.core import TokenTree
from paceline.drafters.base import Drafter
from paceline.engines.base import Engine, wanted
from paceline.models.config import LayerConfig, ModelConfig


@dataclass
class ToySequence:
    tokens: list[int] = field(default_factory=list)

    @property
    def length(self):
        return len(self.tokens)


class ToyEngine(Engine):
    """Sees the last `order` tokens. `noise` adds to the logits of trees, as rounding would."""

    name, format, kv_format, invariant, tolerance = "toy", "none", "none", True, 0.0
    abilities = frozenset({"tokens"})

    def __init__(self, vocab_size=11, context=64, order=2, noise=0.0):
        self.order, self.noise, self.opened = order, noise, 0
        self.config = ModelConfig(
            family="toy",
            vocab_size=vocab_size,
            hidden_size=1,
            context=context,
            layers=(LayerConfig(heads=1, kv_heads=1, head_dim=1, intermediate=1),),
            norm="rms",
            norm_eps=1e-6,
            activation="silu",
            gated=False,
            attention_scale=1.0,
            tied=True,
        )

    def logits_after(self, tokens):
        seed = [len(tokens) % 3, *tokens[-self.order :]]
        return np.random.default_rng(seed).normal(0, 2, self.config.vocab_size).astype("f4")

    def open(self):
        self.opened += 1
        return ToySequence()

    def forward(self, batch, rows="all", view=None):
        out = []
        for (sequence, tree), shown in zip(batch, wanted(rows, batch), strict=True):
            self.check(sequence, tree, view)
            sequence.pending = tree
            texts = []
            for node, token in enumerate(tree.tokens):
                before = texts[tree.parents[node]] if node else sequence.tokens
                texts.append([*before, int(token)])
                logits = self.logits_after(texts[-1])
                if self.noise and len(tree) > 1:
                    logits = logits + np.float32(self.noise) * np.arange(len(logits), dtype="f4")
                out += [logits] * shown
        logits = np.array(out, np.float32).reshape(-1, self.config.vocab_size)
        return logits if view is None or view.tokens is None else logits[:, view.tokens]

    def commit(self, sequence, path):
        path = [int(node) for node in path]
        tree = sequence.pending
        assert path[0] == 0
        assert all(tree.parents[b] == a for a, b in itertools.pairwise(path))
        sequence.tokens += [int(tree.tokens[node]) for node in path]

    def truncate(self, sequence, length):
        del sequence.tokens[length:]

    def fork(self, sequence):
        self.opened += 1
        return ToySequence(list(sequence.tokens))

    def release(self, sequence):
        if not getattr(sequence, "released", False):
            self.opened -= 1
        sequence.released = True


class Oracle(Drafter):
    """Knows the toy engine and guesses right, with wrong siblings around each guess."""

    origins, top_k, learns_from_prompt = ("oracle",), 2, True

    def __init__(self, engine):
        self.engine, self.seen = engine, []

    def propose(self, context, budget, min_path_prob=0.0):
        tokens, parents, text = [int(context[-1])], [-1], [int(t) for t in context]
        parent = 0
        while len(tokens) <= budget:
            best = int(self.engine.logits_after(text).argmax())
            wrong = (best + 1) % self.engine.config.vocab_size
            for token in (wrong, best)[-(1 + budget - len(tokens)) :]:
                tokens.append(token)
                parents.append(parent)
            parent = len(tokens) - 1
            text.append(best)
        n = len(tokens)
        return TokenTree(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.full(n, 0.5, np.float32),
            np.zeros(n, np.int16),
        )

    def observe(self, step):
        self.seen.append(step)

"""Draft with a trained head; `heads/` has the architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paceline.abilities import Ability
from paceline.core import Exactness, Floats, Request, Step, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings, ModelDrafter
from paceline.errors import MethodError
from paceline.registry import Source, drafters

if TYPE_CHECKING:
    from paceline.drafters.heads.base import Head, HeadTarget, Parameters


@drafters.register("head", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class TrainedHead(DraftSettings):
    """Draft with a head that was trained on this model's hidden states.

    The target's hidden state behind the last committed token is known from the last pass. The head
    gives the probabilities of the tokens after the next one; the tree grows best-first by path
    probability, as that of `model`. The first pass after the prompt has no hidden state yet and
    drafts nothing.

    State: the calibration of the head's probabilities, as `model`. Cost of a proposal: one
    evaluation of the head a level.
    Good for: models whose head was trained on the kind of text that they write.

    Attributes:
        path: folder of the head, `head.json` and `head.safetensors`.
        width: nodes expanded at each level. Default 4.
        depth: most levels; the head's own depth is a limit, too. Default 8.
        stop: `confidence`, `bandit` or `depth`, as of `model`.
        threshold: of `confidence`. Default 0.02: a level costs little.
        rate: learning rate of the calibration. Default 0.02.
    """

    source = Source(note="grows trees with any architecture of `drafters/heads`")
    needs = frozenset({Ability.HIDDEN, Ability.TORCH})

    path: str
    threshold: float = 0.02

    def build(self, target: Target) -> Drafter:
        """Load the head for `target`."""
        engine, model = target.engine, target.model
        if engine is None or model is None or Ability.HIDDEN not in engine.abilities:
            raise MethodError(
                "head needs an engine that returns hidden states, and one model; "
                "use native or reference, and no ensemble"
            )
        try:
            import torch
        except ModuleNotFoundError:
            raise MethodError("head needs torch; install paceline[torch]") from None

        from paceline.drafters.heads.base import HeadTarget, load_head

        def tensor(name: str) -> torch.Tensor:
            return torch.tensor(np.asarray(model.weights[name], np.float32))

        embedding = tensor("embed")
        unembedding = embedding if model.config.tied else tensor("head")
        size, vocab = model.config.hidden_size, model.config.vocab_size
        about = HeadTarget(size, vocab, embedding, unembedding)
        head, parameters = load_head(Path(self.path), about)
        return _TrainedHead(self, head, parameters, about)


class _TrainedHead(ModelDrafter):
    origins = ("head",)
    needs_hidden = True
    top_k = 1  # `observe` is called, though it reads the hidden states only

    def __init__(
        self, method: DraftSettings, head: Head, parameters: Parameters, target: HeadTarget
    ) -> None:
        super().__init__(method, target.vocab_size)
        self._head, self._parameters, self._target = head, parameters, target
        self._hidden: Floats | None = None  # [D], behind the token before the next root
        self._position = 0  # length of the context whose root follows it

    def begin(self, request: Request) -> None:
        super().begin(request)
        self._hidden = None

    def observe(self, step: Step) -> None:
        super().observe(step)
        if step.hidden is not None:
            self._hidden = step.hidden[step.path[-1]].copy()
            self._position = len(step.context) + len(step.drawn)

    def room(self, context: Tokens) -> int:
        known = self._hidden is not None and self._position == len(context)
        return self._head.depth - 1 if known else -1

    def run(self, context: Tokens, tree: TokenTree, fresh: int) -> Floats:
        import torch

        rows = np.empty((fresh, self._target.vocab_size), np.float32)
        depths = tree.depths()[-fresh:]
        hidden = torch.from_numpy(self._hidden)[None]
        for depth in np.unique(depths).tolist():  # paths of one length are run together
            places = np.flatnonzero(depths == depth)
            paths = np.empty((len(places), depth + 1), np.int64)
            for row, place in enumerate(places):
                node = len(tree) - fresh + int(place)
                for level in range(depth, -1, -1):
                    paths[row, level] = tree.tokens[node]
                    node = int(tree.parents[node])
            with torch.inference_mode():
                logits = self._head.logits(
                    self._parameters,
                    self._target,
                    hidden.expand(len(places), -1),
                    torch.from_numpy(paths),
                )
            rows[places] = logits.float().numpy()
        return rows

"""PaSS: trained embeddings behind the last token, at which the frozen model looks ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.core import Exactness, Tokens
from paceline.drafters.heads.base import HeadBatch, HeadTarget, InputHead
from paceline.errors import MethodError
from paceline.registry import Source, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("lookahead_embeddings", Exactness.EXACT, aliases=("pass",))
@dataclass(frozen=True)
class LookaheadEmbeddings(InputHead):
    """Put trained embeddings behind the last token, where the model predicts later tokens.

    A draft is one pass of the whole model over the last token and `depth - 1` nodes in a chain,
    whose inputs are trained and nothing else is: the logits behind node i are those of the token
    i + 1 places on, whatever the tokens between. The pass that verifies is a second one, so that
    two passes give at least two tokens. An input is a weighted sum of the embeddings of `mixed`
    tokens, spread over the vocabulary, so that engines run it without rows of their own; only
    these weights are trained, by gradients through the frozen model, in runs of neighbouring
    tokens of the answers that serve as one another's context.

    It pays where a pass over several tokens takes no longer than one over a single token, as where
    weights come from a disk; on a CPU whose arithmetic is the limit it costs more than it gains.

    Attributes:
        depth: tokens predicted, the very next one included. Default 4, from 2 on.
        mixed: embeddings that an input is a sum of. Default 128.
    """

    source = Source(
        authors="Monea et al.",
        title="PaSS: Parallel Speculative Sampling",
        arxiv="2311.13581",
        note="inputs in the span of some embeddings; trees, where the paper has a chain",
    )
    catalogue = (211,)
    missing = {
        211: "keeping the token that the draft pass itself draws; it is verified like others"
    }

    mixed: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(2, 64, self.name, depth=self.depth)
        check_range(1, 1 << 16, self.name, mixed=self.mixed)

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the weights of the mixtures."""
        return {"mix": (self.depth - 1, len(self.mixed_tokens(target.vocab_size)))}

    def mixed_tokens(self, vocab_size: int) -> Tokens:
        """Return the tokens whose embeddings are mixed, int32, spread over the vocabulary."""
        count = min(self.mixed, vocab_size)
        return (np.arange(count) * vocab_size // count).astype(np.int32)

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return random weights, with which an input is as large as an embedding."""
        import torch

        random = torch.Generator().manual_seed(seed)
        shape = self.shapes(target)["mix"]
        return {"mix": torch.randn(shape, generator=random) / shape[1] ** 0.5}

    def logits(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, path: Tensor
    ) -> Tensor:
        """Return the logits [N, U] of states that the model computed at the nodes."""
        return hidden @ target.unembedding.T

    def batch_logits(
        self, parameters: Parameters, target: HeadTarget, batch: HeadBatch
    ) -> list[Tensor]:
        """Return the logits of each distance, of runs of neighbours with inputs behind each."""
        import torch

        if target.frozen is None:
            raise MethodError(f"{self.name} is trained through its model, and none was given")
        count, later = len(batch.hidden), self.depth - 1
        run = self.run if batch.at is not None and count % self.run == 0 else 1
        at = torch.arange(count) if batch.at is None else batch.at
        place = torch.arange(run)
        texts = at.view(-1, run) - place  # the same for neighbours of one text
        same = (texts[:, :, None] == texts[:, None]) & (place[:, None] >= place)  # [B, run, run]
        inputs = parameters["mix"] @ target.embedding[self._rows(target)]  # [later, D]
        tokens = target.embedding[batch.tokens[:, 0]].view(-1, run, target.hidden_size)
        behind = inputs.repeat(run, 1).expand(len(tokens), -1, -1)  # position by position
        steps = torch.arange(1, later + 1)
        positions = torch.cat([place, (place[:, None] + steps).flatten()])
        own = place.repeat_interleave(later)  # the position that an input is behind
        order = steps.repeat(run)
        chain = (own[:, None] == own) & (order[:, None] >= order)
        seen = torch.zeros(len(tokens), len(positions), len(positions), dtype=torch.bool)
        seen[:, :run, :run] = same
        seen[:, run:, :run] = same[:, own]
        seen[:, run:, run:] = chain
        states = target.frozen.states(torch.cat([tokens, behind], 1), positions, seen)
        size = target.hidden_size
        first = states[:, :run].reshape(count, size)
        others = states[:, run:].reshape(count, later, size)
        path = batch.tokens[:, :1]
        found = [first, *others.unbind(1)]
        return [self.logits(parameters, target, each, path) for each in found]

    def _rows(self, target: HeadTarget) -> Tensor:
        import torch

        return torch.from_numpy(self.mixed_tokens(target.vocab_size)).long()

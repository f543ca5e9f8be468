"""An EAGLE-like head: one decoder layer that predicts the next hidden state, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.attention import attend, head_count, neighbours, norm
from paceline.drafters.heads.base import ContextHead, HeadBatch, HeadTarget, embed_path
from paceline.registry import Source, check_range, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("eagle", Exactness.EXACT)
@dataclass(frozen=True)
class Eagle(ContextHead):
    """Predict the next hidden state by a decoder layer over earlier states and their next tokens.

    A position of the layer holds a hidden state h and the token x behind it:
    `z = h + F [norm(h), e(x)]`, with the embedding e and all norms scaled to a root mean square
    of 1. The layer attends to the positions before, up to `window` of them, with a learnt bias for
    each distance in place of rotary embeddings, and a gated MLP follows. What it returns stands for
    the next hidden state: `unembedding @ state` are the logits behind x, and the state and the next
    token of the path are the layer's next position. In training it goes on from its own states
    for all `depth` steps, as when it drafts, with the target's soft predictions as labels.

    Positions reach back to the beginning of the answer, not into the prompt, of which no hidden
    states are computed.

    Attributes:
        depth: tokens predicted after the target's own next token. Default 4.
        window: earlier positions that the layer attends to. Default 32.
        width: units of the MLP over the hidden size, 1 to 8. Default 2.
    """

    source = Source(
        authors="Li et al.",
        title="EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
        arxiv="2401.15077",
        note="unrolled in training as EAGLE-3 (arXiv 2503.01840); labels are the target's "
        "predictions alone; the context is the answer's own last positions",
    )
    catalogue = (116,)
    missing = {
        116: "several layers, trained with the model; passes that alternate without a verification"
    }

    width: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, 8, self.name, width=self.width)

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the input matrix F, those of the layer, and the bias [H, distances]."""
        size, inner = target.hidden_size, target.hidden_size * self.width
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys("qkvo", (size, size))
        return shapes | {
            "in": (size, 2 * size),
            "gate": (inner, size),
            "up": (inner, size),
            "down": (size, inner),
            "bias": (head_count(size), self.window + self.depth),
        }

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return a layer that leaves the state as it is: what is added to it begins at 0."""
        import torch

        parameters = super().initial(target, seed)
        random = torch.Generator().manual_seed(seed)
        for name in ("q", "k", "v", "gate", "up"):
            shape = parameters[name].shape
            parameters[name] = torch.randn(shape, generator=random) / shape[1] ** 0.5
        return parameters

    def encode(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, following: Tensor
    ) -> Tensor:
        """Return keys and values of positions, [M, 2 D]."""
        import torch

        given = _position(parameters, target, hidden, following)
        return torch.cat(_keys_values(parameters, given), -1)

    def logits(
        self,
        parameters: Parameters,
        target: HeadTarget,
        hidden: Tensor,
        path: Tensor,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [N, U] after one step of the layer for each token of the path."""
        import torch

        size = target.hidden_size
        held = hidden.new_zeros(0, 2 * size) if memory is None else memory
        rows = held.expand(len(hidden), -1, -1)  # [N, M, 2 D]
        keys, values = rows[..., :size], rows[..., size:]
        state = hidden
        for token in path.unbind(1):
            given = _position(parameters, target, state, token)
            key, value = _keys_values(parameters, given)
            keys = torch.cat([keys, key[:, None]], 1)
            values = torch.cat([values, value[:, None]], 1)
            distance = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
            bias = parameters["bias"][:, distance]  # [H, S]
            state = _layer(parameters, given[:, None], keys, values, bias[:, None])[:, 0]
        return state @ target.unembedding.T

    def batch_logits(
        self, parameters: Parameters, target: HeadTarget, batch: HeadBatch
    ) -> list[Tensor]:
        """Return the logits of each depth, for runs of neighbours that attend to one another."""
        count, size = len(batch.hidden), target.hidden_size
        run = self.run if batch.at is not None and count % self.run == 0 else 1
        state = batch.hidden.view(-1, run, size)  # [B, T, D]
        distance, unseen = neighbours(batch, run, self.window)
        own: list[tuple[Tensor, Tensor]] = []  # keys and values of the steps after the first
        logits, rows = [], (state, state)
        for step in range(batch.tokens.shape[1] - 1):
            given = _position(parameters, target, state, batch.tokens[:, step].view(-1, run))
            pair = _keys_values(parameters, given)
            rows, own = (pair, own) if step == 0 else (rows, [*own, pair])
            bias = parameters["bias"][:, distance.clamp(0, self.window) + step] + unseen
            nearer = parameters["bias"][:, : len(own)].flip(-1)[None, :, None]  # [1, H, 1, steps]
            state = _layer(parameters, given, *rows, bias, own, nearer)
            logits.append(state.reshape(count, size) @ target.unembedding.T)
        return logits


def _position(parameters: Parameters, target: HeadTarget, hidden: Tensor, token: Tensor) -> Tensor:
    """Return the layer's input, [..., D], of states and the tokens behind them."""
    import torch
    from torch.nn import functional as F

    pair = torch.cat([norm(hidden), embed_path(target, token)], -1)
    return hidden + F.linear(pair, parameters["in"])


def _keys_values(parameters: Parameters, given: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn import functional as F

    normed = norm(given)
    return F.linear(normed, parameters["k"]), F.linear(normed, parameters["v"])


def _layer(
    parameters: Parameters,
    given: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    own: list[tuple[Tensor, Tensor]] | None = None,
    nearer: Tensor | None = None,
) -> Tensor:
    """Return the layer's output of positions [B, T, D]; arguments as those of `attend`."""
    from torch.nn import functional as F

    queries = F.linear(norm(given), parameters["q"])
    mixed = attend(queries, keys, values, bias, own, nearer)
    after = given + F.linear(mixed, parameters["o"])
    normed = norm(after)
    inner = F.silu(F.linear(normed, parameters["gate"])) * F.linear(normed, parameters["up"])
    return after + F.linear(inner, parameters["down"])

"""Chimera: a trigram of the path asks the states of the whole context what comes next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.core import Exactness
from paceline.drafters.heads.attention import attend, head_count, neighbours, norm
from paceline.drafters.heads.base import ContextHead, HeadBatch, HeadTarget, embed_path
from paceline.registry import Source, heads

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.drafters.heads.base import Parameters


@heads.register("chimera", Exactness.EXACT)
@dataclass(frozen=True)
class Chimera(ContextHead):
    """Predict each later token from a trigram, the context's states, and a block of its own.

    The last three tokens, committed ones and those of the path, give `u = T2 silu(T1 [e, e, e])`
    with their embeddings e, of a root mean square of 1. u asks one attention layer over pairs of a
    hidden state and the token behind it, up to `window` of them and the last; c is its answer. The
    logits at depth k are `unembedding @ (h + c + B_k silu(A_k [norm(h), u, c]))`, h the last state.
    Unlike in `eagle`, no depth waits for the state of the one before.

    Attributes:
        depth: tokens predicted after the target's own next token. Default 4.
        window: earlier states that are read. Default 32.
    """

    source = Source(
        authors="Zeng et al.",
        title="Chimera: A Lossless Decoding Method for Accelerating Large Language Models "
        "Inference by Fusing all Tokens",
        arxiv="2402.15758",
        section="section 3",
        note="the context is the answer's own last positions; labels are the target's predictions",
    )
    catalogue = (97,)
    missing = {97: "states of the prompt in the context layer"}

    def shapes(self, target: HeadTarget) -> dict[str, tuple[int, ...]]:
        """Return the trigram's matrices, those of the layer, and two for each depth."""
        size = target.hidden_size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys("qo", (size, size))
        shapes |= dict.fromkeys("kv", (size, 2 * size))
        for depth in range(1, self.depth + 1):
            shapes |= {f"{depth}.in": (size, 3 * size), f"{depth}.out": (size, size)}
        return shapes | {
            "trigram.in": (size, 3 * size),
            "trigram.out": (size, size),
            "bias": (head_count(size), self.window + self.depth),
        }

    def initial(self, target: HeadTarget, seed: int) -> dict[str, Tensor]:
        """Return parameters that leave the state as it is: what is added to it begins at 0."""
        import torch

        parameters = super().initial(target, seed)
        random = torch.Generator().manual_seed(seed)
        blocks = [f"{depth}.in" for depth in range(1, self.depth + 1)]
        for name in ("trigram.in", "trigram.out", "q", "k", "v", *blocks):
            shape = parameters[name].shape
            parameters[name] = torch.randn(shape, generator=random) / shape[1] ** 0.5
        return parameters

    def encode(
        self, parameters: Parameters, target: HeadTarget, hidden: Tensor, following: Tensor
    ) -> Tensor:
        """Return keys, values and embeddings of positions, [M, 3 D]."""
        import torch

        token = embed_path(target, following)
        return torch.cat([*_keys_values(parameters, hidden, token), token], -1)

    def logits(
        self,
        parameters: Parameters,
        target: HeadTarget,
        hidden: Tensor,
        path: Tensor,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Return the logits [N, U] of the depth of the path's length."""
        import torch

        size, count = target.hidden_size, len(hidden)
        held = hidden.new_zeros(0, 3 * size) if memory is None else memory
        rows = held.expand(count, -1, -1)  # [N, M, 3 D]
        tokens = embed_path(target, path)  # [N, L, D]
        key, value = _keys_values(parameters, hidden, tokens[:, 0])
        keys = torch.cat([rows[..., :size], key[:, None]], 1)
        values = torch.cat([rows[..., size : 2 * size], value[:, None]], 1)
        before = torch.cat([hidden.new_zeros(count, 2, size), rows[..., 2 * size :], tokens], 1)
        distance = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
        bias = parameters["bias"][:, distance + path.shape[1] - 1][:, None]  # [H, 1, S]
        trigram = _trigram(parameters, before[:, -3:].flatten(-2))[:, None]
        state = self._state(parameters, path.shape[1], hidden[:, None], trigram, keys, values, bias)
        return state[:, 0] @ target.unembedding.T

    def batch_logits(
        self, parameters: Parameters, target: HeadTarget, batch: HeadBatch
    ) -> list[Tensor]:
        """Return the logits of each depth, for runs of neighbours that read one another."""
        import torch

        count, size = len(batch.hidden), target.hidden_size
        run = self.run if batch.at is not None and count % self.run == 0 else 1
        hidden = batch.hidden.view(-1, run, size)  # [B, T, D]
        depths = batch.tokens.shape[1] - 1
        tokens = embed_path(target, batch.tokens[:, :-1]).view(-1, run, depths, size)
        distance, unseen = neighbours(batch, run, self.window)
        same = unseen[:, 0] == 0  # [B, T, T]
        first = tokens[:, :, 0]
        earlier = []
        for back in (2, 1):  # embeddings of the two tokens before the path, 0 where not known
            known = torch.diagonal(same, -back, 1, 2) if back < run else same[:, :0, 0]
            unknown = first.new_zeros(len(first), min(back, run), size)
            shifted = first[:, : run - back] * known[..., None]
            earlier.append(torch.cat([unknown, shifted], 1))
        recent = torch.cat([torch.stack(earlier, 2), tokens], 2)  # [B, T, 2 + depth, D]
        keys, values = _keys_values(parameters, hidden, first)
        logits = []
        for depth in range(1, depths + 1):
            trigram = _trigram(parameters, recent[:, :, depth - 1 : depth + 2].flatten(-2))
            bias = parameters["bias"][:, distance.clamp(0, self.window) + depth - 1] + unseen
            state = self._state(parameters, depth, hidden, trigram, keys, values, bias)
            logits.append(state.reshape(count, size) @ target.unembedding.T)
        return logits

    def _state(
        self,
        parameters: Parameters,
        depth: int,
        hidden: Tensor,
        trigram: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Return what the output matrix multiplies at a depth, [B, T, D]."""
        import torch
        from torch.nn import functional as F

        query = F.linear(norm(trigram), parameters["q"])
        context = F.linear(attend(query, keys, values, bias), parameters["o"])
        whole = torch.cat([norm(hidden), trigram, context], -1)
        inner = F.silu(F.linear(whole, parameters[f"{depth}.in"]))
        return hidden + context + F.linear(inner, parameters[f"{depth}.out"])


def _trigram(parameters: Parameters, tokens: Tensor) -> Tensor:
    """Return the code [..., D] of three embeddings [..., 3 D]."""
    from torch.nn import functional as F

    inner = F.silu(F.linear(tokens, parameters["trigram.in"]))
    return F.linear(inner, parameters["trigram.out"])


def _keys_values(parameters: Parameters, hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of states and the embeddings of the tokens behind them."""
    import torch
    from torch.nn import functional as F

    pair = torch.cat([norm(hidden), token], -1)
    return F.linear(pair, parameters["k"]), F.linear(pair, parameters["v"])

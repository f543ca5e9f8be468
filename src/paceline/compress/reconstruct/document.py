"""Training on the tokens of a text themselves, not on the distributions of another model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from paceline.compress.reconstruct.recovery import HEADED, Recovery

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.blocks import LayerWeights


class DocumentTraining(Recovery):
    """Training of a model, as `Recovery`, whose loss is minus the log-probability of each token."""

    def loss(self, rows: Tensor, weights: Sequence[LayerWeights]) -> float:
        """Return the loss of some texts, int64 [B], in nats a token, for weights of the layers."""
        import torch

        texts = self.student.texts[rows]
        with torch.no_grad():
            states = self._states(texts, weights)[:, :-1]
            return self._token_loss(states, texts[:, 1:])

    def backwards(self, rows: Tensor) -> float:
        """Add the gradients of the loss on some texts; return it."""
        import torch

        texts = self.student.texts[rows]
        with torch.enable_grad():
            states = self._states(texts, self.trained_weights())[:, :-1]
            ends = states.detach().requires_grad_()
            loss = self._token_loss(ends, texts[:, 1:], learn=True)
            assert ends.grad is not None
            torch.autograd.backward(states, ends.grad)
        return loss

    def _token_loss(self, x: Tensor, tokens: Tensor, learn: bool = False) -> float:
        """Return the loss of the last block's outputs; add gradients if asked."""
        import torch

        flat, next_tokens, total = x.flatten(0, 1), tokens.flatten(), 0.0
        for start in range(0, len(flat), HEADED):
            part = slice(start, start + HEADED)
            chosen = self.student.log_probs(flat[part]).gather(1, next_tokens[part, None])
            loss = -chosen.sum() / len(flat)
            total += float(loss.detach())
            if learn:
                torch.autograd.backward(loss)
        return total

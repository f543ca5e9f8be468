"""Gradients of the texts' loss by the matrices, one text and one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paceline.compress.base import MATRICES
from paceline.compress.whole_model import WholeModel, run_block

if TYPE_CHECKING:
    from torch import Tensor


def text_gradients(model: WholeModel, rows: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the index of a layer and the gradients of one text's loss by its matrices, [out, in].

    The loss is the mean of minus the log-probability of the next token, in nats. The last layer
    comes first, with each of the first `rows` texts; then the one before it.
    """
    import torch

    texts = model.texts[:rows]
    states = [model.embed(texts)]
    for index in range(len(model.config.layers)):
        states.append(model.run(index, states[-1]))
    ends = torch.stack(
        [_head_gradient(model, *each) for each in zip(texts, states[-1], strict=True)]
    )
    for index in reversed(range(len(model.config.layers))):
        weights = model.layer(index)
        names = [name for name in MATRICES if name in weights]
        for row in range(len(texts)):
            with torch.enable_grad():
                x = states[index][row : row + 1].detach().requires_grad_()
                leaves = {name: weights[name].detach().requires_grad_() for name in names}
                y = run_block(model.config, model.config.layers[index], {**weights, **leaves}, x)
                before, *own = torch.autograd.grad(y, [x, *leaves.values()], ends[row : row + 1])
            ends[row] = before[0]
            yield index, dict(zip(names, own, strict=True))


def _head_gradient(model: WholeModel, text: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a text's loss at the last block's outputs [T, hidden]."""
    import torch

    with torch.enable_grad():
        states = x.detach().requires_grad_()
        log_probs = model.log_probs(states[:-1])
        loss = -log_probs.gather(1, text[1:, None]).mean()
        (gradient,) = torch.autograd.grad(loss, states)
    return gradient

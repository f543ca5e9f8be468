"""How much errors in the outputs of attention and MLP cost, from gradients of the whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.compress.structure.widths.slicing import READERS

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from paceline.compress.whole_model import WholeModel


def output_sensitivities(model: WholeModel, rows: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return G for the outputs of `o` and `down` of each layer, float32 [hidden, hidden].

    An error d of the outputs at a position costs about d' G d / 2 nats: G is the mean outer product
    of the gradients of the loss at tokens that the model itself draws, its Fisher information.

    Args:
        model: that is run forwards and backwards.
        rows: texts, of the model's.
        seed: of the tokens that are drawn.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = [{} for _ in model.config.layers]
    texts = model.texts[:rows]
    for text in texts:
        inputs = [model.embed(text[None])]
        for index in range(len(found)):
            inputs.append(model.run(index, inputs[-1]))
        gradient = _head_gradient(model, inputs[-1], generator)
        for index in reversed(range(len(found))):
            gradient = _backwards(model, index, inputs[index], gradient, found[index])
    return [{name: each / texts.numel() for name, each in layer.items()} for layer in found]


def _head_gradient(model: WholeModel, x: Tensor, generator: Generator) -> Tensor:
    """Return the gradient of the loss at the last block's outputs [1, T, hidden]."""
    import torch

    with torch.enable_grad():
        states = x.detach().requires_grad_()
        log_probs = model.log_probs(states[0])
        with torch.no_grad():
            drawn = torch.multinomial(log_probs.exp(), 1, generator=generator)
        loss = -log_probs.gather(1, drawn).sum()
        (gradient,) = torch.autograd.grad(loss, states)
    return gradient


def _backwards(
    model: WholeModel, index: int, x: Tensor, gradient: Tensor, found: dict[str, Tensor]
) -> Tensor:
    """Add to what is found of a layer; return the gradient at its inputs."""
    import torch
    from torch.nn import functional as F

    from paceline.compress.whole_model import run_block

    outputs: dict[str, Tensor] = {}

    def tapped(name: str, matrix: Tensor) -> object:
        def multiply(seen: Tensor) -> Tensor:
            outputs[name] = F.linear(seen, matrix)
            return outputs[name]

        return multiply

    weights = dict(model.layer(index))
    products = {name: tapped(name, weights[name]) for name in READERS if name in weights}
    with torch.enable_grad():
        inputs = x.detach().requires_grad_()
        y = run_block(
            model.config,
            model.config.layers[index],
            {**weights, **products},  # type: ignore[dict-item]
            inputs,
        )
        wanted = [inputs, *outputs.values()]
        before, *own = torch.autograd.grad(y, wanted, gradient)
    for name, each in zip(outputs, own, strict=True):
        flat = each.flatten(0, -2)
        found[name] = found.get(name, 0) + flat.T @ flat
    return before

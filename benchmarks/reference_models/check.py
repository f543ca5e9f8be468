"""Check on a GPU that block masks train as dense ones do: same loss, same gradients.

python -m benchmarks.reference_models.check && attention=blocks || attention=dense
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.embedded_model.model import Llama
from benchmarks.reference_models.family import FAMILY
from benchmarks.reference_models.train import compile_layers, head_loss
from benchmarks.reference_models.windows import END_OF_TEXT, Blocks, Dense

TOLERANCE = 0.03  # of the largest gradient: bfloat16 keeps 8 bits


def gradients(attention: str, device: str, compiled: bool) -> list[Tensor]:
    """Return the loss and all gradients of a fresh model on random documents."""
    shape = replace(FAMILY["5m"].shape, num_hidden_layers=2)
    length = shape.max_position_embeddings
    torch.manual_seed(0)
    model = Llama(shape).to(device)
    tokens = torch.randint(shape.vocab_size, (2, length + 1), device=device)
    tokens[:, ::300] = END_OF_TEXT
    for weight in model.parameters():  # a fresh model's layers do nothing
        torch.nn.init.normal_(weight, std=0.05)
    if compiled:
        compile_layers(model)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    mask = (Dense() if attention == "dense" else Blocks(2, length, device))(inputs)
    with torch.autocast(device, torch.bfloat16):
        loss = head_loss(model, model.states(inputs, mask), targets) / targets.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    return [
        loss.detach(),
        *(weight.grad for weight in model.parameters() if weight.grad is not None),
    ]


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two lists of tensors, each relative to its largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    kind = "blocks" if device == "cuda" else "dense"
    difference = largest_difference(
        gradients(kind, device, compiled=True), gradients("dense", device, compiled=False)
    )
    print(f"compiled {kind}: largest relative difference {difference:.1e}, allowed {TOLERANCE}")
    if not difference <= TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

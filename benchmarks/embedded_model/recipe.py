"""How the rates fall and what they drive: the recipe of every model trained here."""

import math

import torch

from benchmarks.embedded_model.model import Llama

MATRIX_RATE = 0.02  # Muon, on the layers' matrices
VECTOR_RATE = 0.004  # AdamW, on the embedding and the norms
WARM_UP = 0.02  # share of the run
FLOOR = 0.01  # share of the peak rate at the end


def rate_scale(share: float) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, then a cosine."""
    if share < WARM_UP:
        return max(share / WARM_UP, 0.01)
    progress = min((share - WARM_UP) / (1 - WARM_UP), 1.0)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2


def optimisers(model: Llama, vector_rate: float = VECTOR_RATE) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest, each remembering its peak rate."""
    layers = list(model.model.layers.parameters())
    matrices = [p for p in layers if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    built: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=vector_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimiser in built:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return built

"""Greedy decoding by one compiled pass for each token: what drafting on a GPU is compared with.

As gpt-fast does it (https://github.com/meta-pytorch/gpt-fast): keys and values in memory of a fixed
size, one pass that `torch.compile` fuses and a CUDA graph replays, and the next token chosen on the
device, so that the host waits only at the end.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch

from paceline.core import TokenTree
from paceline.engines.static import StaticEngine
from paceline.engines.static_pass import StaticPass, pass_numbers


class GreedyPass(StaticPass):
    """A pass over one token that puts the most likely next one where the next pass reads it."""

    def _compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        state, logits = super()._compute()
        token = logits[0].argmax()
        self._inputs[0].copy_(token)
        self._inputs[1:4].add_(1)  # position, row, committed rows
        return state, token


class CompiledLoop:
    """Decodes greedily over the memory and weights of a static engine.

    Args:
        engine: holds them.
        compiled: whether passes are compiled; otherwise they are CUDA graphs only.
    """

    def __init__(self, engine: StaticEngine, compiled: bool) -> None:
        self._engine = engine
        self._compiled = compiled
        self._passes: dict[int, GreedyPass] = {}  # by the memory that they are bound to

    @torch.inference_mode()
    def generate(self, prompt: np.ndarray, count: int) -> tuple[list[int], float]:
        """Return the tokens after a prompt, and the seconds that they took without it."""
        engine = self._engine
        sequence = engine.start(prompt[:-1])
        slot = sequence.slot
        step = self._passes.get(id(slot))
        if step is None:
            step = self._passes[id(slot)] = GreedyPass(
                *(engine.config, engine._outer, engine._layers, engine._rotations, slot.layers),
                size=1,
                span=engine._rows,
                compiled=self._compiled,
                pool=engine._pool,
            )
        root = pass_numbers(TokenTree.root(int(prompt[-1])), sequence.length, 1, engine._spare)
        tokens = torch.empty(count, dtype=torch.int64, device=engine.device)
        synchronise(engine.device)
        start = perf_counter()
        tokens[0] = step.run(root)[1]
        for place in range(1, count):
            tokens[place] = step.again()[1]
        found = tokens.tolist()
        seconds = perf_counter() - start
        engine.release(sequence)
        return found, seconds


def synchronise(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()

"""The reference engine with an exit policy: tokens leave out parts of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.core import Floats, TokenTree
from paceline.engines.base import Cached
from paceline.engines.collaborators import LayerExits
from paceline.engines.reference import ReferenceEngine
from paceline.engines.reference_cache import ReferenceCache
from paceline.models import blocks
from paceline.models.gated_block import BlockGate, ExitPass, gated_block


class ExitingEngine(ReferenceEngine):
    """Runs a model whose tokens leave out what an exit policy says.

    A decision compares a number with a threshold: where rounding moves a number across it, as trees
    of other sizes can, more than `tolerance` may change.

    Args:
        exits: the policy; between passes the attribute of that name may be another one.
        args: of `ReferenceEngine`.
        options: likewise.

    Attributes:
        nodes: nodes times layers that passes held, those of prompts included.
        attended: of these, how many ran the attention.
        fed: how many ran the MLP.
    """

    exits: LayerExits

    def __init__(self, exits: LayerExits, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.exits = exits
        self.nodes = self.attended = self.fed = 0
        self._gate: BlockGate | None = None

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how many positions a prompt would have given alike: those of the prompt."""
        return min(super().prompt_positions(sequence), _prompt(sequence))

    def _run(self, sequence: ReferenceCache, tree: TokenTree, *args: Any, **options: Any) -> Floats:
        at = torch.from_numpy(sequence.length + tree.depths().astype(np.int64)).to(self._device)
        config = self.config

        def logits(states: Tensor) -> Tensor:
            final = blocks.final_state(states, config, self._outer)
            return blocks.head(final, config, self._outer)

        nodes = ExitPass(len(config.layers), at, at < sequence.prompt, logits)
        with torch.inference_mode():
            self._gate = self.exits.gate(nodes)
        return super()._run(sequence, tree, *args, **options)

    def _block(self, index: int, x: Tensor, *args: Any) -> Tensor:
        assert self._gate is not None
        layer, weights = self.config.layers[index], self._layers[index]
        x, attended, fed = gated_block(
            int(index), self._gate, x, self.config, layer, weights, *args
        )
        self.nodes += len(x)
        self.attended += attended
        self.fed += fed
        return x


def _prompt(sequence: Cached) -> int:
    return sequence.prompt if isinstance(sequence, ReferenceCache) else 0

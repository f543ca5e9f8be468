"""What a prompt with documents gives in one pass with explicit positions and an explicit mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from paceline.models import blocks


@dataclass
class Oracle:
    """Tokens with a position each, and which others each of them sees, itself included."""

    model: object
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)

    def add(self, token: int, position: int, sees: list[int]) -> int:
        self.tokens.append(token)
        self.positions.append(position)
        self.seen.append([*sees, len(self.seen)])
        return len(self.seen) - 1

    @torch.inference_mode()
    def logits(self) -> np.ndarray:
        """Logits of the last token."""
        config, weights = self.model.config, self.model.weights
        outer, layers = {}, [{} for _ in config.layers]
        for name in weights:
            tensor = torch.tensor(np.asarray(weights.dense(name)))
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                layers[int(index)][rest] = tensor
            else:
                outer[name] = tensor
        where = torch.tensor(self.positions)
        hidden = np.full((len(self.seen), len(self.seen)), -np.inf, np.float32)
        for node, sees in enumerate(self.seen):
            hidden[node, sees] = 0
        x = blocks.embed(torch.tensor(self.tokens), where, config, outer)
        for layer, own in zip(config.layers, layers, strict=True):
            near = where[:, None] - where < (layer.window or 1 << 30)
            mask = torch.tensor(hidden).masked_fill(~near, -torch.inf)
            x = blocks.block(x, config, layer, own, mask, blocks.rotation_of(layer, where))
        return blocks.head(blocks.final_state(x[-1:], config, outer), config, outer)[0].numpy()


def apart(model, before, documents, after, sink, runs=()) -> np.ndarray:
    """Return the logits behind a prompt whose documents were computed apart.

    Args:
        model: a checkpoint.
        before, documents, after: the prompt.
        sink: stands before each document.
        runs: for each document (start, stop) of tokens that are computed in the prompt instead.
    """
    oracle, cache, position = Oracle(model), [], 0
    for token in before:
        cache.append(oracle.add(token, position, cache))
        position += 1
    for index, document in enumerate(documents):
        own = []
        for offset, token in enumerate(sink):  # nobody else sees it
            own.append(oracle.add(token, position - len(sink) + offset, own))
        for offset, token in enumerate(document):
            own.append(oracle.add(token, position + offset, own))
        rows = own[len(sink) :]
        for start, stop in runs[index] if runs else ():
            for offset in range(start, stop):
                sees = [*cache, *rows[:offset]]
                rows[offset] = oracle.add(document[offset], position + offset, sees)
        cache += rows
        position += len(document)
    for token in after:
        cache.append(oracle.add(token, position, cache))
        position += 1
    return oracle.logits()

"""Contiguous layers of a model: what one of several engines runs where the model is split.

The first part turns tokens into hidden states, the last one hidden states into logits; those
between take hidden states and give hidden states. Parts that run one behind the other do the same
operations on the same numbers as one engine with all layers, so that every bit is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from paceline.core import Floats
from paceline.errors import ModelError, RequestError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.tensors import Linear
from paceline.models.weights import Weights


@dataclass(frozen=True, slots=True)
class Part:
    """Layers `first` to `last` - 1 of a model with `layers` layers.

    Raises:
        ModelError: there are no such layers.
    """

    first: int
    last: int
    layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last <= self.layers:
            raise ModelError(
                f"layers {self.first} to {self.last} are no part of a model with {self.layers}"
            )

    @property
    def begins(self) -> bool:
        """Whether it holds the first layer, and with it the embedding."""
        return self.first == 0

    @property
    def ends(self) -> bool:
        """Whether it holds the last layer, and with it the head."""
        return self.last == self.layers

    def __str__(self) -> str:
        return f"layers {self.first} to {self.last - 1}"

    def config(self, config: ModelConfig) -> ModelConfig:
        """Return the shape of the part, from that of the whole model.

        Raises:
            ModelError: the model has another number of layers.
        """
        if len(config.layers) != self.layers:
            raise ModelError(
                f"{self} of {self.layers} were asked for, and the model has {len(config.layers)}; "
                "copy the same checkpoint to every node"
            )
        return replace(config, layers=config.layers[self.first : self.last])

    def weights(
        self, config: ModelConfig, weights: Mapping[str, Linear | Floats]
    ) -> Mapping[str, Linear | Floats]:
        """Return the weights of the part, its layers counted from 0; `config` is the whole's."""
        names = {}
        for name in weights:
            kept = self._name(config, name)
            if kept is not None:
                names[kept] = name
        if isinstance(weights, Weights):
            return weights.renamed(names)
        return {kept: weights[name] for kept, name in names.items()}

    def _name(self, config: ModelConfig, name: str) -> str | None:
        stem, _, rest = name.partition(".")
        if stem == "layers":
            index, _, part = rest.partition(".")
            inside = self.first <= int(index) < self.last
            return f"layers.{int(index) - self.first}.{part}" if inside else None
        begins = self.begins and stem in ("embed", "positions")
        head = "embed" if config.tied else "head"
        ends = self.ends and (stem in (head, "final_norm") or name == "head.bias")
        return name if begins or ends else None

    def check_states(self, nodes: int, width: int, states: Floats | None) -> None:
        """Refuse hidden states of another shape than [nodes, width]; the first part has none.

        Raises:
            RequestError: as said.
        """
        if (states is None) != self.begins:
            wanted = "tokens, not hidden states" if self.begins else "the hidden states before them"
            raise RequestError(f"{self} take {wanted}")
        if states is None:
            return
        if states.shape != (nodes, width) or states.dtype != np.float32:
            raise RequestError(
                f"hidden states are {states.dtype} {list(states.shape)}, expected float32 "
                f"{[nodes, width]}"
            )


def split_layers(config: ModelConfig, count: int) -> list[Part]:
    """Split a model into `count` parts that take about as long as each other.

    The head counts as part of the last layers. Every part has attention in a layer at least.

    Raises:
        ModelError: the model has fewer layers with attention.
    """
    attending = sum(layer.heads > 0 for layer in config.layers)
    if count > attending:
        raise ModelError(
            f"a model with {attending} layers with attention cannot be split into {count} parts; "
            "take fewer"
        )
    costs = [_cost(config, layer) for layer in config.layers]
    costs[-1] += config.vocab_size * config.hidden_size
    ends = _balanced(costs, [layer.heads > 0 for layer in config.layers], count)
    starts = [0, *ends[:-1]]
    return [Part(a, b, len(costs)) for a, b in zip(starts, ends, strict=True)]


def _balanced(costs: list[int], attends: list[bool], count: int) -> list[int]:
    """Return where each of `count` runs ends, so that the most expensive one costs least."""
    layers = len(costs)
    sums = np.concatenate([[0], np.cumsum(costs)])
    heads = np.concatenate([[0], np.cumsum(attends)])
    best = {(0, 0): (0.0, -1)}  # (runs, layers in them) -> (largest cost, start of the last run)
    for runs in range(1, count + 1):
        for end in range(1, layers + 1):
            options = [
                (max(best[runs - 1, start][0], float(sums[end] - sums[start])), start)
                for start in range(end)
                if (runs - 1, start) in best and heads[end] > heads[start]
            ]
            if options:
                best[runs, end] = min(options)
    ends = [layers]
    for runs in range(count, 1, -1):
        ends.append(best[runs, ends[-1]][1])
    return ends[::-1]


def _cost(config: ModelConfig, layer: LayerConfig) -> int:
    """Return the number of weights of a layer's matrices."""
    wide = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    return config.hidden_size * (wide + (3 if config.gated else 2) * layer.intermediate)

"""Keys and values of one document, computed apart from any prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.core import Floats
from paceline.engines.base import Cached, Engine
from paceline.engines.sides import engine_sides
from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import DUAL_CHUNK

NEEDS = frozenset({Ability.KEYS, Ability.QUERIES, Ability.APPEND_ROWS})
# The parameter of a scaling that says up to where angles add up.
_LIMITS = {"dynamic": "original_max_position_embeddings", DUAL_CHUNK: "chunk"}
_LARGEST_HALF = 60_000.0  # magnitude up to which float16 stands in for the cache's own rounding


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Rows of a document whose tokens saw a sink and each other, and nothing else.

    Attributes:
        start: position of the first token, which is the number of tokens of the sink.
        keys, values: [H_kv, N, D] for each layer, float32, or float16 where the cache is coarser.
            Keys are rotated for the positions from `start` on.
        queries: [H, N, D] of the layers `probes`, likewise rotated, times the attention scale.
    """

    start: int
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    queries: dict[int, np.ndarray]

    def __len__(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(each.nbytes for each in (*self.keys, *self.values, *self.queries.values()))

    def rows(
        self, config: ModelConfig, position: int, first: int, last: int
    ) -> list[tuple[Floats, Floats]]:
        """Return the rows of tokens `first` to `last`, for `Engine.append_rows`.

        Args:
            config: the model's shape.
            position: of the document's first token, to which its keys are moved.
            first: index of a token.
            last: index of the token that is no more part of it.
        """
        by = position - self.start
        return [
            (moved(layer, keys[:, first:last], by), _floats(values[:, first:last]))
            for layer, keys, values in zip(config.layers, self.keys, self.values, strict=True)
        ]


def read_chunk(engine: Engine, sequence: Cached, start: int) -> Chunk:
    """Return the rows of a sequence that holds a sink of `start` tokens and a document.

    Args:
        engine: has computed the sequence.
        sequence: tracks the queries of the document's tokens.
        start: tokens before the document.
    """
    coarse = engine.kv_format in ("fp16", "int8")
    pairs = [engine.keys_values(sequence, each) for each in range(len(engine.config.layers))]
    queries = {
        each: _stored(engine.recent_queries(sequence, each), True) for each in probes(engine.config)
    }
    return Chunk(
        start,
        tuple(_stored(keys[:, start:], coarse) for keys, _ in pairs),
        tuple(_stored(values[:, start:], coarse) for _, values in pairs),
        queries,
    )


def probes(config: ModelConfig) -> tuple[int, ...]:
    """Return the layers whose queries tell how much a token depends on what stands before.

    One at five sixths of those that see all positions, or of all layers.
    """
    attending = [index for index, layer in enumerate(config.layers) if layer.heads]
    whole = [index for index in attending if config.layers[index].window is None]
    chosen = whole or attending
    return (chosen[len(chosen) * 5 // 6],)


def moved(layer: LayerConfig, keys: np.ndarray, by: int) -> Floats:
    """Return rotated keys or queries [..., D] of a layer as they would be `by` positions on."""
    own = _floats(keys)
    return own if layer.rope is None else layer.rope.moved(own, by)


def check_engine(engine: Engine, end: int = 0) -> None:
    """Refuse models whose keys cannot be moved to other positions, and engines without abilities.

    Args:
        engine: runs the model.
        end: last position that documents may reach.

    Raises:
        MethodError: names what is in the way.
    """
    check({Side.DOCUMENTS: "documents", **engine_sides(engine)})
    check_needs("documents", NEEDS, engine.name, engine.abilities)
    config = engine.config
    if config.learned_positions:
        raise MethodError(
            "documents are moved to other positions, and this model's positions are learned "
            "embeddings that do not move; give the documents as part of the prompt"
        )
    if config.qk_norm == "rotated":
        raise MethodError(
            "documents are moved to other positions, and this model norms keys behind their "
            "rotation, so that they do not move; give the documents as part of the prompt"
        )
    for scaling, rope in _changing(config.layers):
        if end > rope:
            raise MethodError(
                f"documents end at position {end}, and the {scaling} rotary scaling of this model "
                f"changes behind {rope:.0f}; give shorter ones, or rope yarn:factor=2"
            )


def _changing(layers: Sequence[LayerConfig]) -> set[tuple[str, float]]:
    """Return scalings whose angles do not add up, and the lengths up to which they do."""
    ropes = {layer.rope for layer in layers if layer.rope is not None}
    return {
        (rope.scaling, dict(rope.parameters)[name])
        for rope in ropes
        for scaling, name in _LIMITS.items()
        if rope.scaling == scaling
    }


def _stored(rows: Floats, coarse: bool) -> np.ndarray:
    half = coarse and bool(np.abs(rows).max(initial=0.0) < _LARGEST_HALF)
    return np.ascontiguousarray(rows, np.float16 if half else np.float32)


def _floats(rows: np.ndarray) -> Floats:
    return np.ascontiguousarray(rows, np.float32)

"""Filter a prompt by what its first layers look at: the whole model reads the rest alone.

Based on GemFilter (Shi et al. 2024, "Discovering the Gems in Early Layers", arXiv 2409.17422,
algorithm 1; catalogue 346). What is kept can be read: it is a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.compatibility import check_needs
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines import open_engine
from paceline.engines.base import Engine
from paceline.engines.part import Part
from paceline.errors import MethodError, RequestError
from paceline.models import Model

_CHUNK = 512  # tokens of a pass


@dataclass(frozen=True)
class FilteredPrompt:
    """What a filter kept of a prompt.

    Attributes:
        tokens: the kept token ids, in their order: the prompt that is to be run.
        positions: where each stood in the prompt, increasing.
        length: number of tokens of the prompt.
        text: the kept tokens as text, for people.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    length: int
    text: str


def filter_part(layers: int, layer: int | None) -> Part:
    """Return the layers that a filter runs; `layer` is the last one, None: at two fifths.

    Raises:
        RequestError: the model has no such layer.
    """
    if layer is None:
        layer = max(0, round(0.4 * layers) - 1)
    if not 0 <= layer < layers:
        raise RequestError(f"layer {layer} was asked for, and the model has 0 to {layers - 1}")
    return Part(0, layer + 1, layers)


def open_filter(model: Model, whole: Engine, layer: int | None, weight_format: str) -> Engine:
    """Open the first layers of a model as an engine of their own, beside the whole model's.

    Raises:
        MethodError: the model runs in another engine than native or reference, alone and in memory.
        RequestError: it has no such layer.
    """
    if whole.name not in ("native", "reference") or whole.streamed_bytes:
        kind = "one whose layers stream from disk" if whole.streamed_bytes else whole.name
        raise MethodError(
            "a prompt filter holds the first layers again, in the native or the reference engine, "
            f"and this engine is {kind}; take engine=native without weights_memory"
        )
    return open_engine(
        model,
        whole.name,
        threads=whole.threads,
        device=whole.device,
        weight_format=weight_format,
        part=filter_part(len(whole.config.layers), layer),
    )


def kept_positions(
    engine: Engine,
    tokens: Sequence[int],
    keep: int,
    *,
    pool: int = 5,
    first: int = 1,
    last: int = 16,
) -> NDArray[np.int64]:
    """Return which positions of a prompt a filter keeps, increasing.

    The engine's layers run over the prompt. In its last layer the products of the last token's
    queries with all keys are summed over the heads, and averaged over `pool` neighbours; the
    positions with the largest sums are kept, of equals the earlier.

    Args:
        engine: runs the first layers of a model, see `filter_part`; it has the abilities `KEYS`
            and `QUERIES`.
        tokens: the prompt, at least one.
        keep: number of positions; a prompt with no more is kept whole, without a pass.
        pool: neighbours that are averaged, odd. As in the authors' program.
        first: positions at the beginning that are always kept, as a text's first token is where
            much attention rests. Not in the paper.
        last: positions at the end that are always kept: the question. Not in the paper.

    Raises:
        RequestError: a number is out of range, the prompt is longer than the model sees, or the
            filter layer has a window or no attention.
        MethodError: the engine lacks an ability.
        MemoryFullError: there is no room for the keys of the prompt.
    """
    if pool < 1 or pool % 2 == 0:
        raise RequestError(f"pool is {pool}, expected an odd number from 1 on")
    if first < 0 or last < 1 or keep < first + last:
        raise RequestError(
            f"keep is {keep}, first {first} and last {last}; expected keep to hold both, "
            "first from 0 on and last from 1 on"
        )
    size = len(tokens)
    if size <= keep:
        return np.arange(size)
    if size > engine.config.context:
        raise RequestError(
            f"the prompt has {size} tokens, but the model sees {engine.config.context}; shorten it"
        )
    check_needs("a prompt filter", {Ability.KEYS, Ability.QUERIES}, engine.name, engine.abilities)
    index = len(engine.config.layers) - 1
    layer = engine.config.layers[index]
    if layer.window is not None or not layer.heads:
        raise RequestError(
            f"layer {index} does not look at the whole prompt; take another layer for the filter"
        )
    scores = _scores(engine, np.array(tokens, np.int32), index)
    pooled = _averaged(scores, pool)
    pooled[:first] = np.inf
    pooled[size - last :] = np.inf
    best = np.argsort(-pooled, kind="stable")[:keep]
    kept: NDArray[np.int64] = np.sort(best)
    return kept


def _scores(engine: Engine, tokens: Tokens, index: int) -> NDArray[np.float64]:
    """Return the products of the last query with all keys of a layer, summed over heads, [S]."""
    sequence = engine.open()
    try:
        engine.track_queries(sequence, 1)
        for begin in range(0, len(tokens), _CHUNK):
            tree = TokenTree.chain(tokens[begin : begin + _CHUNK])
            if engine.part is None:
                engine.forward([(sequence, tree)], "none")
            else:
                engine.forward_part([(sequence, tree)], None, "none")
            engine.commit(sequence, np.arange(len(tree)))
        queries = engine.recent_queries(sequence, index)[:, -1]  # [H, D]
        keys = engine.keys_values(sequence, index)[0]  # [G, S, D]
    finally:
        engine.release(sequence)
    together: Floats = queries.reshape(len(keys), -1, queries.shape[-1]).sum(1)  # [G, D]
    return np.asarray(np.einsum("gd,gsd->s", together.astype(np.float64), keys), np.float64)


def _averaged(scores: NDArray[np.float64], pool: int) -> NDArray[np.float64]:
    """Return the mean of each position and its neighbours; zeros lie beyond the ends."""
    return np.convolve(scores, np.full(pool, 1 / pool))[pool // 2 :][: len(scores)]

"""How long the attention and the MLP of a layer take on this machine, in the form they have."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline import __version__
from paceline.cache_dir import cached_json
from paceline.core import Floats, TokenTree
from paceline.machine import machine
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.tensors import Linear

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.engines.native import NativeEngine

Tensors = Mapping[str, Linear | Floats]

_VOCABULARY = 64  # of the models that are timed: their heads take next to no time
_CONTEXT = 64  # cached positions
_PASSES = 15  # that are timed; the fastest quarter counts, as other work may slow them down


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one module in a pass of one token, measured once and kept in the cache folder.

    Attributes:
        config: the model's shape.
        shape: of a layer with attention that stands before those that are timed.
        first: tensors of that layer, in any form.
        threads: of the engine; None takes one for each core.
        folder: where times are kept; see `cached_json`.
    """

    config: ModelConfig
    shape: LayerConfig
    first: Tensors
    threads: int | None = None
    folder: Path | None = None

    def seconds(self, shape: LayerConfig, tensors: Tensors, form: str) -> float:
        """Return the time of a layer, from a model of as many of its like as the model has layers.

        Args:
            shape: of the layer, with attention, an MLP or both.
            tensors: of the layer.
            form: names what is stored, e.g. a recipe; times of the same form are not measured anew.
        """
        if not tensors:
            return 0.0
        sizes = [shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate]
        return self._kept(["module", form, *sizes], lambda: self._measure(shape, tensors))

    def rest(self, outer: Tensors, form: str) -> float:
        """Return the time of a pass without the layers: embedding, head and what a call takes.

        Args:
            outer: tensors outside the layers, with the real vocabulary.
            form: names what is stored.
        """

        def measure() -> float:
            config = replace(self.config, layers=(self.shape,))
            own = {f"layers.0.{name}": each for name, each in self.first.items()}
            whole = _pass_seconds(_engine(config, {**outer, **own}, self.threads))
            return max(whole - self.seconds(self.shape, self.first, form), 1e-9)

        return self._kept(["rest", form], measure)

    def _measure(self, shape: LayerConfig, tensors: Tensors) -> float:
        """Return by how much a layer makes a pass longer that has `first` in any case."""
        count, times = max(2, len(self.config.layers)), []
        for more in (0, count):
            layers = (self.shape, *(shape,) * more)
            config = replace(self.config, layers=layers, vocab_size=_VOCABULARY, tied=True)
            weights: dict[str, Linear | Floats] = dict(_small_outer(config))
            weights |= {f"layers.0.{name}": each for name, each in self.first.items()}
            for index in range(1, more + 1):
                weights |= {f"layers.{index}.{name}": each for name, each in tensors.items()}
            times.append(_pass_seconds(_engine(config, weights, self.threads)))
        return max((times[1] - times[0]) / count, 1e-9)

    def _kept(self, what: list[object], measure: Any) -> float:
        """Return a time that was measured before, or measure it."""
        about: list[object] = [
            __version__,
            self.threads,
            self.config.hidden_size,
            self.config.vocab_size,
        ]
        about += [len(self.config.layers), self.config.family, _CONTEXT, *what]
        text = json.dumps([machine(), about], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cached_json(
            "module-time",
            key,
            lambda: {"about": about, "seconds": measure()},
            lambda found: float(found["seconds"]),
            self.folder,
        )


def _engine(config: ModelConfig, weights: Tensors, threads: int | None) -> NativeEngine:
    from paceline.engines.native import NativeEngine

    return NativeEngine(config, weights, threads, "auto")


def _pass_seconds(engine: NativeEngine) -> float:
    """Return the time of a pass of one token behind cached positions of zeros."""
    context = min(_CONTEXT, engine.config.context - 1)
    sequence = engine.open()
    rows = [
        (np.zeros((each.kv_heads, context, each.head_dim), np.float32),) * 2
        for each in engine.config.layers
    ]
    engine.append_rows(sequence, rows)
    tree = TokenTree.chain(np.zeros(1, np.int32))
    times = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        engine.forward([(sequence, tree)])
        times.append(time.perf_counter() - start)
    engine.release(sequence)
    return float(np.quantile(times[2:], 0.25))


def _small_outer(config: ModelConfig) -> dict[str, Floats]:
    """Return tensors outside the layers, of zeros and ones."""
    hidden = config.hidden_size
    outer: dict[str, Floats] = {"embed": np.zeros((config.vocab_size, hidden), np.float32)}
    if config.norm != "plain":
        outer["final_norm"] = np.ones(hidden, np.float32)
    if config.norm == "layer":
        outer["final_norm.bias"] = np.zeros(hidden, np.float32)
    if config.learned_positions:
        rows = config.context + config.position_offset
        outer["positions"] = np.zeros((rows, hidden), np.float32)
    return outer

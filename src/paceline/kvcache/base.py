"""The contract of a KV policy, in two levels: which rows to keep, and a score of each row.

The law: a policy acts only when the committed length is a multiple of its `every`, and reads only
what is committed. Whoever drives a sequence lets no chunk of a prompt and no tree reach beyond
the next multiple, so that every position is computed with the rows that plain decoding, one token
at a time, would have left it. Speculation, chunks, batches and threads then cannot change what a
policy keeps, and the output under a policy is the same for every drafter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.core import Floats, Tokens
from paceline.engines.base import Cached, Engine
from paceline.engines.sides import engine_sides
from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.registry import Method, check_range, kv_policies

Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """What a policy may read of one layer's cache: committed state, the same for any drafter.

    Attributes:
        index: of the layer.
        layers: number of layers of the model.
        length: positions committed so far, evicted ones too.
        positions: int32 [H_kv, S], positions of the rows that are held, increasing in every head;
            -1 before them where a head holds fewer rows than another.
        mass: float64 [H_kv, S], attention that each row received; None unless the policy needs it.
        keys: float32 [H_kv, S, D], rotated, as the cache rounds them; None likewise.
        values: float32 [H_kv, S, D]; None likewise.
        queries: float32 [H, W, D] of the last W positions, rotated and scaled; None likewise.
        surprisal: float64 [length], negative log-probability of each committed token; None
            likewise.
        config: the model's shape; None where nothing needs it.
    """

    index: int
    layers: int
    length: int
    positions: Tokens
    mass: Scores | None = None
    keys: Floats | None = None
    values: Floats | None = None
    queries: Floats | None = None
    surprisal: Scores | None = None
    config: ModelConfig | None = None

    @property
    def shape(self) -> LayerConfig:
        """The layer's shape."""
        assert self.config is not None
        return self.config.layers[self.index]

    @property
    def attention_mass(self) -> Scores:
        """Attention that each row received from all committed positions, float64 [H_kv, S].

        Raises:
            MethodError: the policy's `needs` do not name `Ability.ATTENTION_MASS`.
        """
        if self.mass is None:
            raise MethodError("this policy reads the attention mass, which its needs do not name")
        return self.mass


@dataclass(frozen=True)
class Policy(Method, ABC):
    """Bounds the rows that every KV head holds. A method writes `keep`.

    Attributes:
        budget: rows that a head keeps whenever the policy acts.
        sinks: first positions of the text, which are always kept.
        every: the policy acts at committed lengths that are multiples of it; in between a head
            grows to `budget + every` rows. Chunks of prompts are no longer than this.
    """

    needs: ClassVar[frozenset[Ability]] = frozenset({Ability.EVICT})

    budget: int = 1024
    sinks: int = 4
    every: int = 64

    @property
    def required(self) -> frozenset[Ability]:
        """Return what the policy needs with its settings; those that read others need more."""
        return self.needs

    @property
    def query_window(self) -> int:
        """Last positions whose queries the policy reads, if `needs` names `Ability.QUERIES`."""
        return 1

    def __post_init__(self) -> None:
        check_range(1, 1 << 30, self.name, budget=self.budget, every=self.every)
        check_range(0, self.budget, self.name, sinks=self.sinks)

    @abstractmethod
    def keep(self, layer: LayerCache) -> Tokens:
        """Return which rows of a layer stay.

        A pure function of `layer`. It is called when a head holds more than `budget` rows.

        Returns:
            indices of rows, increasing, int32 [H_kv, K] with K up to `budget`; -1 before them
            where a head keeps fewer. See `max_rows` where K is larger.
        """

    def choose(self, layers: Sequence[LayerCache]) -> list[Tokens]:
        """Return which rows stay in each layer, as `keep` does; for choices between layers.

        Args:
            layers: of the model; each is read from the engine whenever it is taken.
        """
        return [
            self.keep(layer)
            if layer.positions.shape[1] > self.budget
            else held_rows(layer.positions)
            for layer in layers
        ]

    def check(self, engine: Engine) -> None:
        """Refuse an engine that lacks what the policy needs, or reads some positions only.

        Raises:
            MethodError: as said.
        """
        policy = f"the KV policy {self.name}"
        check({Side.KV_POLICY: policy, **engine_sides(engine)})
        check_needs(policy, self.required, engine.name, engine.abilities)

    def begin(self, engine: Engine, sequence: Cached) -> None:
        """Prepare an empty sequence."""
        if Ability.ATTENTION_MASS in self.required:
            engine.track_attention(sequence)
        if Ability.QUERIES in self.required:
            engine.track_queries(sequence, self._window(engine))
        if Ability.SURPRISAL in self.required:
            engine.track_surprisal(sequence)

    def distance(self, length: int) -> int:
        """Return how many positions may be committed, from `length` on, before the policy acts."""
        return self.every - length % self.every

    def max_rows(self, length: int) -> int:
        """Return the most rows that a sequence of up to `length` positions ever holds in a head."""
        return min(length, self.budget + self.every)

    def query_pages(self, engine: Engine, length: int) -> int:
        """Return how many pages the queries take that are kept of up to `length` positions."""
        if Ability.QUERIES not in self.required:
            return 0
        return engine.query_pages(min(length, self._window(engine)))

    def _window(self, engine: Engine) -> int:
        return min(self.query_window, engine.config.context)

    def act(self, engine: Engine, sequence: Cached) -> bool:
        """Evict rows if this is the length to do it; return whether any were.

        Raises:
            MemoryFullError: as `Engine.evict`.
        """
        if sequence.length % self.every or engine.row_count(sequence) <= self.budget:
            return False
        layers = LayerCaches(self.required, engine, sequence)
        engine.evict(sequence, layers.all_layers(self.choose(layers)))
        return True


class LayerCaches(Sequence[LayerCache]):
    """What a policy needs to know of each layer with attention, read when it is taken."""

    def __init__(self, needs: frozenset[Ability], engine: Engine, sequence: Cached) -> None:
        self._needs, self._engine, self._sequence = needs, engine, sequence
        self._surprisal = engine.surprisal(sequence) if Ability.SURPRISAL in needs else None
        self._indices = attention_layers(engine.config)

    def __len__(self) -> int:
        return len(self._indices)

    def all_layers(self, kept: Sequence[Tokens]) -> list[Tokens]:
        """Return the rows to keep of all layers, from those of the layers with attention."""
        found = dict(zip(self._indices, kept, strict=True))
        count = len(self._engine.config.layers)
        return [found.get(index, np.empty((0, 0), np.int32)) for index in range(count)]

    @overload
    def __getitem__(self, index: int) -> LayerCache: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerCache]: ...
    def __getitem__(self, index: int | slice) -> LayerCache | Sequence[LayerCache]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        needs, engine, sequence = self._needs, self._engine, self._sequence
        index = self._indices[index]
        keys = values = None
        if Ability.KEYS in needs:
            keys, values = engine.keys_values(sequence, index)
        return LayerCache(
            index,
            len(engine.config.layers),
            sequence.length,
            engine.rows(sequence, index),
            engine.attention_mass(sequence, index) if Ability.ATTENTION_MASS in needs else None,
            keys,
            values,
            engine.recent_queries(sequence, index) if Ability.QUERIES in needs else None,
            self._surprisal,
            engine.config,
        )


def attention_layers(config: ModelConfig) -> tuple[int, ...]:
    """Return the indices of the layers that have attention."""
    return tuple(index for index, layer in enumerate(config.layers) if layer.heads)


def held_rows(positions: Tokens) -> Tokens:
    """Return the indices of all rows that heads hold, int32 [H_kv, S]; -1 before them."""
    rows = np.tile(np.arange(positions.shape[1], dtype=np.int32), (len(positions), 1))
    rows[positions < 0] = -1
    return rows


def pad_rows(rows: Sequence[Tokens]) -> Tokens:
    """Return the indices that each head keeps as one array int32 [H_kv, K], -1 before them."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for own, kept in zip(padded, rows, strict=True):
        own[len(own) - len(kept) :] = kept
    return padded


@dataclass(frozen=True)
class ScoringPolicy(Policy):
    """Keeps the rows with the highest scores besides the first and the last. Write `score`.

    In layers with a window, rows that no later position sees come last, whatever their score.

    Attributes:
        budget, sinks, every: as of `Policy`.
        recent: last positions of the text, which are always kept.
    """

    recent: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, self.budget - self.sinks, self.name, recent=self.recent)

    @abstractmethod
    def score(self, layer: LayerCache) -> Scores:
        """Return what each row is worth, float64 [H_kv, S]; higher stays. Pure."""

    def head_budgets(self, layer: LayerCache, scores: Scores) -> NDArray[np.int64]:
        """Return how many rows each head keeps, int64 [H_kv]; a policy may part a layer's rows.

        Args:
            layer: of which rows are chosen.
            scores: float64 [H_kv, S], infinite where a row stays in any case, -inf where none is.
        """
        return np.full(len(scores), self.budget)

    def keep(self, layer: LayerCache) -> Tokens:
        """Return the sinks, the recent rows, and the best of the others; of equals the earlier."""
        scores = self.final_scores(layer)
        return best_rows(layer.positions, scores, self.head_budgets(layer, scores))

    def final_scores(self, layer: LayerCache) -> Scores:
        """Return scores that are infinite where a row stays in any case, and -inf where none is."""
        scores = np.array(self.score(layer), np.float64)
        if scores.shape != layer.positions.shape:
            raise MethodError(
                f"{self.name} scored {list(scores.shape)} rows, expected "
                f"{list(layer.positions.shape)}"
            )
        if layer.config is not None and layer.shape.window is not None:
            near = layer.shape.near(layer.length - layer.positions, layer.positions)
            scores[~near] = -np.inf
        always = layer.positions < self.sinks
        always |= layer.positions >= layer.length - self.recent
        scores[always] = np.inf
        scores[layer.positions < 0] = -np.inf
        return scores


def best_rows(positions: Tokens, scores: Scores, counts: NDArray[np.int64]) -> Tokens:
    """Return the best rows of each head, so many as `counts` [H_kv] says or all that it holds.

    Returns:
        indices of rows, increasing, int32 [H_kv, K]; -1 before them where a head keeps fewer.
    """
    held = positions >= 0
    order = np.argsort(-np.where(held, scores, -np.inf), axis=1, kind="stable")
    kept = []
    for own, there, count in zip(order, held, counts, strict=True):
        # Rows that are not held may tie with others, which come first.
        kept.append(np.sort(own[there[own]][:count]).astype(np.int32))
    return pad_rows(kept)


def parse_policy(text: str) -> Policy:
    """Return the policy that `NAME[:key=value,...]` names.

    Raises:
        MethodError: a name or setting is unknown, or a value is out of range.
    """
    policy: Policy = kv_policies.parse(text)
    return policy

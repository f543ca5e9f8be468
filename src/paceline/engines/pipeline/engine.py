"""The engine over a pipeline: passes through all nodes, and replacements of those that are lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from threading import RLock
from typing import NamedTuple
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import ArrayLike

from paceline.abilities import Ability
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows, wanted
from paceline.engines.part import Part
from paceline.engines.pipeline.rebuild import rebuild
from paceline.engines.pipeline.sequence import KeptRows, PipelineSequence
from paceline.engines.pipeline.stage import Nodes, Stage, StageEntry, StageLostError
from paceline.engines.view import View
from paceline.engines.wrapper import EngineWrapper
from paceline.errors import ModelError, RequestError
from paceline.models.config import ModelConfig

ATTEMPTS = 5  # nodes that may be lost, one after the other, before a pass is given up
PIECE = 64  # tree nodes from which a batch is cut: fewer wait for memory, not for arithmetic
Batch = Sequence[tuple[Cached, TokenTree]]


class _Arrival(NamedTuple):
    """Hidden states that a stage returned, or what went wrong: of a piece of the batch."""

    piece: int
    stage: int
    states: Future[Floats]


class PipelineEngine(EngineWrapper):
    """Runs the first layers of a model on other nodes, and the last ones in this process.

    Views, eviction and whatever else needs every layer at hand are not offered; see `abilities`.

    Args:
        config: shape of the whole model.
        last: engine that holds the last part.
        nodes: starts the stages of the parts before, the first ones at once.
        stages: number of these, 1 or more.

    Attributes:
        replaced: number of nodes that were lost and replaced.

    Raises:
        PacelineError: a node cannot be started.
    """

    def __init__(self, config: ModelConfig, last: Engine, nodes: Nodes, stages: int) -> None:
        super().__init__(last)
        if last.part is None or not last.part.ends or last.part.begins:
            raise ModelError("a pipeline ends in an engine that holds the last layers of several")
        self.config, self.abilities = config, last.abilities & {Ability.HIDDEN}
        self.replaced = 0
        self._first_layer = last.part.first
        self._nodes = nodes
        self._lock = RLock()
        self._keys = count(1)
        self._open: set[int] = set()  # keys of sequences on the nodes
        self._dropped: deque[int] = deque()  # keys of sequences that nobody holds any more
        self._sequences: WeakValueDictionary[int, PipelineSequence] = WeakValueDictionary()
        self._stages: list[Stage] = []
        self._closing = finalize(self, _close, nodes, self._stages)
        try:
            self._stages += _started(nodes, range(stages))
        except BaseException:
            self._closing()
            raise

    def close(self) -> None:
        """End the nodes; twice is harmless. It happens by itself when nobody holds the engine."""
        self._closing()

    @property
    def part(self) -> Part | None:  # type: ignore[override]  # an attribute there
        """None: the pipeline runs the whole model."""
        return None

    @property
    def remote_layers(self) -> int:  # type: ignore[override]  # an attribute there
        """Number of layers on other nodes."""
        return self._first_layer

    def check_whole(self) -> None:
        """Accept: the pipeline runs the whole model."""

    def open(self) -> Cached:
        """Open an empty sequence on every node."""
        with self._lock:
            kept = [KeptRows() for _ in self._stages[1:]]
            opened = PipelineSequence(next(self._keys), self.inner.open(), states=kept)
            self._register(opened)
            self._change("open", opened.key)
            return opened

    def forward(self, batch: Batch, rows: Rows = "all", view: View | None = None) -> Floats:
        """Run trees through all nodes; see `Engine.forward`.

        Raises:
            ModelError: nodes are lost again and again, or one cannot be replaced.
            RequestError, MemoryFullError: as `Engine.forward`.
        """
        if view is not None:
            raise RequestError("a pipeline over nodes has no views; an engine on one machine has")
        for sequence, tree in batch:
            self.check(sequence, tree)
        own = [(_own(sequence), tree) for sequence, tree in batch]
        if len({sequence.key for sequence, _ in own}) < len(own):
            raise RequestError("a sequence appears twice in the batch")
        with self._lock:
            self._release_dropped()
            for _ in range(ATTEMPTS):
                try:
                    self._replace_lost()
                    return self._pass(own, wanted(rows, batch))
                except StageLostError as error:
                    reason = error
            raise ModelError(
                f"{ATTEMPTS} nodes were lost in one pass, the last one because {reason}; look "
                "for what ends them, e.g. their memory"
            )

    def _pass(self, batch: list[tuple[PipelineSequence, TokenTree]], rows: list[bool]) -> Floats:
        """Run a batch once, in pieces that follow each other through the stages."""
        pieces = _pieces([len(tree) for _, tree in batch], len(self._stages) + 1)
        entries = [
            [StageEntry(own.key, tree.tokens, tree.parents) for own, tree in batch[piece]]
            for piece in pieces
        ]
        given: list[list[Floats]] = [[] for _ in pieces]  # inputs of the stages behind the first
        logits: list[Floats] = [np.empty(0, np.float32)] * len(pieces)
        arrivals: SimpleQueue[_Arrival] = SimpleQueue()

        def begin(piece: int, stage: int, states: Floats | None) -> None:
            future = self._stages[stage].run(entries[piece], states)
            future.add_done_callback(
                lambda done: arrivals.put(_Arrival(piece, stage, done))  # from any thread
            )

        for piece in range(len(pieces)):
            begin(piece, 0, None)
        for _ in range(len(pieces) * len(self._stages)):
            piece, stage, done = arrivals.get()
            states = done.result()
            if stage + 1 < len(self._stages):
                given[piece].append(states)
                begin(piece, stage + 1, states)
                continue
            part = pieces[piece]
            local = [(own.local, tree) for own, tree in batch[part]]
            made = self.inner.forward_part(local, states, rows[part])
            logits[piece] = made if len(pieces) == 1 else made.copy()
        for run, inputs in zip(pieces, given, strict=True):
            _remember(batch[run], inputs)
        return logits[0] if len(pieces) == 1 else np.concatenate(logits)

    def forward_part(self, batch: Batch, states: Floats | None, rows: Rows = "all") -> Floats:
        """Refuse: the pipeline runs the whole model."""
        raise RequestError("a pipeline over nodes runs a whole model, not a part of its layers")

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Refuse mixtures."""
        raise RequestError("a pipeline over nodes cannot mix tokens")

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of a path on every node."""
        own, nodes = _own(sequence), np.asarray(path, np.int32)
        with self._lock:
            self.inner.commit(own.local, nodes)
            own.commit(nodes)
            self._change("commit", own.key, *nodes.tolist())

    def truncate(self, sequence: Cached, length: int) -> None:
        """Drop positions on every node."""
        own = _own(sequence)
        with self._lock:
            self.inner.truncate(own.local, length)
            own.truncate(length)
            self._change("truncate", own.key, length)

    def fork(self, sequence: Cached) -> Cached:
        """Fork a sequence on every node."""
        own = _own(sequence)
        with self._lock:
            forked = own.fork(next(self._keys), self.inner.fork(own.local))
            self._register(forked)
            self._change("fork", own.key, forked.key)
            return forked

    def release(self, sequence: Cached) -> None:
        """Give the memory of every node back; twice is harmless."""
        own = _own(sequence)
        with self._lock:
            self.inner.release(own.local)
            own.truncate(0)
            self._sequences.pop(own.key, None)
            self._release_key(own.key)

    def pages(self, sequence: Cached) -> Sequence[int]:
        """Return what tells the pages of a sequence apart; every node has as many."""
        return self.inner.pages(_own(sequence).local)

    def rows(self, sequence: Cached, layer: int) -> Tokens:
        """Return the positions of the rows held; none is ever evicted."""
        _own(sequence)
        return Engine.rows(self, sequence, layer)

    def row_count(self, sequence: Cached) -> int:
        """Return how many rows are held."""
        return _own(sequence).length

    def set_prompt(self, sequence: Cached, length: int) -> None:
        """Do nothing: every position reads all that came before."""

    def prompt_positions(self, sequence: Cached) -> int:
        """Return how much a prompt would have given alike: everything."""
        return _own(sequence).length

    def prompt_chunk(self, sequence: Cached, size: int) -> int:
        """Return `size`: prompts are read in parts of any size."""
        return size

    def cut_point(self, sequence: Cached, length: int) -> int:
        """Return where a sequence can be cut; see `Engine.cut_point`."""
        return self.inner.cut_point(_own(sequence).local, length)

    def check(self, sequence: Cached, tree: TokenTree, view: View | None = None) -> None:
        """Refuse what cannot be run; see `Engine.check`."""
        Engine.check(self, _own(sequence), tree, view)

    def _register(self, sequence: PipelineSequence) -> None:
        self._sequences[sequence.key] = sequence
        self._open.add(sequence.key)
        finalize(sequence, self._dropped.append, sequence.key).atexit = False

    def _release_dropped(self) -> None:
        """Release sequences on the nodes that were dropped without `release`."""
        while self._dropped:
            self._release_key(self._dropped.popleft())

    def _release_key(self, key: int) -> None:
        if key in self._open:
            self._open.discard(key)
            self._change("release", key)

    def _change(self, operation: str, key: int, *values: int) -> None:
        for stage in self._stages:
            stage.change(operation, key, *values)

    def _replace_lost(self) -> None:
        """Start a replacement for each node that is lost, and compute its caches again.

        Raises:
            PacelineError: there is none.
            StageLostError: a replacement was lost, too.
        """
        lost = [index for index, stage in enumerate(self._stages) if stage.lost is not None]
        if not lost:
            return
        for index, stage in zip(lost, _started(self._nodes, lost), strict=True):
            self._stages[index].close()
            self._stages[index] = stage
            self.replaced += 1
            rebuild(stage, index, [self._sequences[key] for key in sorted(self._sequences)])


def _close(nodes: Nodes, stages: list[Stage]) -> None:
    for stage in stages:
        stage.close()
    nodes.close()


def _own(sequence: Cached) -> PipelineSequence:
    if not isinstance(sequence, PipelineSequence):
        raise RequestError("this sequence belongs to another engine")
    return sequence


def _started(nodes: Nodes, indices: Sequence[int]) -> list[Stage]:
    """Start stages, again where one is lost while it loads.

    Raises:
        PacelineError: a node cannot be started.
    """
    for _ in range(ATTEMPTS):
        try:
            return nodes.start(indices)
        except StageLostError as error:
            reason = error
    raise ModelError(
        f"no node could load its layers in {ATTEMPTS} attempts, the last one because {reason}"
    )


def _pieces(sizes: list[int], stages: int) -> list[slice]:
    """Cut trees of these sizes into runs, at most one for each stage, of `PIECE` nodes or more."""
    most = max(1, min(stages, sum(sizes) // PIECE))
    pieces, start, nodes = [], 0, 0
    for index, size in enumerate(sizes):
        nodes += size
        if nodes * most >= sum(sizes) or index + 1 == len(sizes):
            pieces.append(slice(start, index + 1))
            start, nodes = index + 1, 0
    return pieces


def _remember(batch: list[tuple[PipelineSequence, TokenTree]], inputs: list[Floats]) -> None:
    """Keep what the stages were given in a pass, until some of it is committed.

    Args:
        batch: N nodes in all.
        inputs: float32 [sum of N, hidden] of each stage behind the first.
    """
    start = 0
    for own, tree in batch:
        rows = slice(start, start + len(tree))
        own.pending = tree.tokens, [states[rows] for states in inputs]
        start += len(tree)

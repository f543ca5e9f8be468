"""The engine over a pipeline: passes through all nodes, and replacements of those that are lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from threading import RLock
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import ArrayLike

from paceline.abilities import Ability
from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine, Rows, wanted
from paceline.engines.part import Part
from paceline.engines.pipeline.flight import Flight, Member, Piece
from paceline.engines.pipeline.rebuild import rebuild
from paceline.engines.pipeline.sequence import KeptRows, PipelineSequence
from paceline.engines.pipeline.stage import Nodes, Stage, StageLostError
from paceline.engines.view import View
from paceline.engines.wrapper import EngineWrapper
from paceline.errors import ModelError, RequestError
from paceline.models.config import ModelConfig

ATTEMPTS = 5  # nodes that may be lost, one after the other, before a pass is given up
Batch = Sequence[tuple[Cached, TokenTree]]


class PipelineEngine(EngineWrapper):
    """Runs the first layers of a model on other nodes, and the last ones in this process.

    Views, eviction and whatever else needs every layer at hand are not offered; see `abilities`.

    Args:
        config: shape of the whole model.
        last: engine that holds the last part.
        nodes: starts the stages of the parts before, the first ones at once.
        stages: number of these, 1 or more.
        passes_in_flight: see `Engine`; None: one for each part, so that all can work at once.

    Attributes:
        replaced: number of nodes that were lost and replaced.

    Raises:
        PacelineError: a node cannot be started.
    """

    def __init__(
        self,
        config: ModelConfig,
        last: Engine,
        nodes: Nodes,
        stages: int,
        passes_in_flight: int | None = None,
    ) -> None:
        super().__init__(last)
        if last.part is None or not last.part.ends or last.part.begins:
            raise ModelError("a pipeline ends in an engine that holds the last layers of several")
        self.config, self.abilities = config, last.abilities & {Ability.HIDDEN}
        self.passes_in_flight = passes_in_flight or stages + 1
        self.replaced = 0
        self._first_layer = last.part.first
        self._nodes = nodes
        self._lock = RLock()
        self._keys = count(1)
        self._open: set[int] = set()  # keys of sequences on the nodes
        self._dropped: deque[int] = deque()  # keys of sequences that nobody holds any more
        self._sequences: WeakValueDictionary[int, PipelineSequence] = WeakValueDictionary()
        self._stages: list[Stage] = []
        self._flights: list[Flight] = []  # under way, or not finished
        self._hidden: Floats | None = None  # of the last pass, where it was cut into pieces
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
        return self.finish(self.begin(batch, rows))

    def begin(self, batch: Batch, rows: Rows = "all") -> Flight:
        """Send trees to the first node; see `Engine.begin`.

        Raises:
            RequestError: as `Engine.forward`, or a sequence is in a pass under way.
        """
        for sequence, tree in batch:
            self.check(sequence, tree)
        members = [
            Member(_idle(sequence), tree, each)
            for (sequence, tree), each in zip(batch, wanted(rows, batch), strict=True)
        ]
        if len({member.own.key for member in members}) < len(members):
            raise RequestError("a sequence appears twice in the batch")
        flight = Flight(members)
        with self._lock:
            self._release_dropped()
            for member in members:
                member.own.flight = flight
            self._flights.append(flight)
            flight.begin(self._stages)
        return flight

    def finish(self, started: object, kept: Sequence[bool] | None = None) -> Floats:
        """Run the last part once the nodes have answered; see `Engine.finish`.

        Raises:
            ModelError: nodes are lost again and again, or one cannot be replaced.
            RequestError, MemoryFullError: as `Engine.forward`.
        """
        if not isinstance(started, Flight) or started not in self._flights:
            raise RequestError("this pass was finished, or belongs to another engine")
        chosen = [True] * len(started.members) if kept is None else kept
        keys = {
            member.own.key
            for member, keep in zip(started.members, chosen, strict=True)
            if keep and not member.own.released
        }
        with self._lock:
            try:
                for _ in range(ATTEMPTS):
                    try:
                        return self._last_part(started, keys)
                    except StageLostError as error:
                        reason = str(error)
                    self._recover()
            finally:
                self._leave(started)
        raise ModelError(
            f"{ATTEMPTS} nodes were lost in one pass, the last one because {reason}; look "
            "for what ends them, e.g. their memory"
        )

    def abandon(self, started: object) -> None:
        """Wait for a pass no longer; see `Engine.abandon`."""
        if isinstance(started, Flight) and started in self._flights:
            with self._lock:
                started.abandoned = True
                for member in started.members:
                    member.own.flight = None

    def hidden(self) -> Floats:
        """Return the hidden states of the last pass, of all its pieces; see `Engine.hidden`."""
        return self.inner.hidden() if self._hidden is None else self._hidden

    def _last_part(self, flight: Flight, keys: set[int]) -> Floats:
        """Run the last part over the pieces of a pass, in the order in which they arrive.

        Args:
            flight: the pass.
            keys: of the sequences whose trees are run.

        Raises:
            StageLostError: a node was lost.
            PacelineError: as `finish`.
        """
        self._hidden = None
        made = [
            self._piece(piece, flight.wait(piece), keys, several=len(flight.pieces) > 1)
            for piece in flight.pieces
        ]
        flight.settle()
        if len(made) == 1:
            return made[0][0]
        logits = [each for each, _ in made if len(each)]
        hidden = [each for _, each in made if each is not None]
        self._hidden = np.concatenate(hidden) if hidden else None
        return np.concatenate(logits) if logits else np.empty((0, self.config.vocab_size), "f4")

    def _piece(
        self, piece: Piece, states: Floats, keys: set[int], several: bool
    ) -> tuple[Floats, Floats | None]:
        """Run the last part over a piece; return its logits, and hidden states if others follow."""
        kept = [
            (member, rows)
            for member, rows in zip(piece.members, piece.rows(), strict=True)
            if member.own.key in keys
        ]
        if len(kept) < len(piece.members):
            states = np.concatenate([states[:0], *(states[rows] for _, rows in kept)])
        if not kept:
            return np.empty((0, self.config.vocab_size), np.float32), None
        batch = [(member.own.local, member.tree) for member, _ in kept]
        asked = [member.wanted for member, _ in kept]
        logits = self.inner.forward_part(batch, states, asked)
        if not several:
            return logits, None
        gives = Ability.HIDDEN in self.abilities and any(asked)
        return logits.copy(), self.inner.hidden().copy() if gives else None

    def forward_part(self, batch: Batch, states: Floats | None, rows: Rows = "all") -> Floats:
        """Refuse: the pipeline runs the whole model."""
        raise RequestError("a pipeline over nodes runs a whole model, not a part of its layers")

    def forward_mixed(self, sequence: Cached, tokens: Tokens, weights: Floats) -> Floats:
        """Refuse mixtures."""
        raise RequestError("a pipeline over nodes cannot mix tokens")

    def commit(self, sequence: Cached, path: ArrayLike) -> None:
        """Keep the rows of a path on every node."""
        own, nodes = _idle(sequence), np.asarray(path, np.int32)
        with self._lock:
            self.inner.commit(own.local, nodes)
            own.commit(nodes)
            self._change("commit", own.key, *nodes.tolist())

    def truncate(self, sequence: Cached, length: int) -> None:
        """Drop positions on every node."""
        own = _idle(sequence)
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
        """Give the memory of every node back; twice is harmless.

        Nodes hear of it when no pass with the sequence is under way.
        """
        own = _own(sequence)
        with self._lock:
            self.inner.release(own.local)
            own.truncate(0)
            own.released = True
            self._sequences.pop(own.key, None)
            self._dropped.append(own.key)
            self._release_dropped()

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
        """Release sequences on the nodes, but those of passes that are under way."""
        for flight in [each for each in self._flights if each.abandoned and each.settled]:
            self._flights.remove(flight)
            flight.forget()
        flying = {member.own.key for flight in self._flights for member in flight.members}
        for _ in range(len(self._dropped)):
            key = self._dropped.popleft()
            if key in flying:
                self._dropped.append(key)
            elif key in self._open:
                self._open.discard(key)
                self._change("release", key)

    def _leave(self, flight: Flight) -> None:
        """Forget a pass that is finished, or has failed and is not under way."""
        flight.settle()
        self._flights.remove(flight)
        flight.forget()
        self._release_dropped()

    def _change(self, operation: str, key: int, *values: int) -> None:
        for stage in self._stages:
            stage.change(operation, key, *values)

    def _recover(self) -> None:
        """Replace the nodes that are lost, compute their caches again, and begin lost passes anew.

        Raises:
            PacelineError: there is no replacement.
        """
        for flight in self._flights:
            flight.settle()
        try:
            self._replace_lost()
        except StageLostError:
            return  # the passes that wait for it try again
        for flight in self._flights:
            if flight.lost and not flight.abandoned:
                flight.begin(self._stages)

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


def _idle(sequence: Cached) -> PipelineSequence:
    own = _own(sequence)
    if own.flight is not None:
        raise RequestError("this sequence is in a pass that was begun; finish that first")
    return own


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

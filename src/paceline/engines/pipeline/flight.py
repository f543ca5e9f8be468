"""A pass on its way through the nodes, of which several may be under way at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from threading import Condition
from typing import NamedTuple

import numpy as np

from paceline.core import Floats, TokenTree
from paceline.engines.pipeline.sequence import PipelineSequence
from paceline.engines.pipeline.stage import Stage, StageEntry, StageLostError

PIECE = 64  # tree nodes from which a batch is cut: fewer wait for memory, not for arithmetic


class Member(NamedTuple):
    """One tree of a pass.

    Attributes:
        own: its sequence.
        tree: what is run.
        wanted: whether its logits are.
    """

    own: PipelineSequence
    tree: TokenTree
    wanted: bool

    @property
    def entry(self) -> StageEntry:
        """Return what a node is told."""
        return StageEntry(self.own.key, self.tree.tokens, self.tree.parents)


class Piece:
    """Some trees of a pass, which go through the nodes together.

    Attributes:
        members: the trees.
        inputs: float32 [sum of N, hidden] that each node behind the first was given.
        states: what the last node returned; None: it has not, or the piece failed.
        error: why it failed.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.inputs: list[Floats] = []
        self.states: Floats | None = None
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way."""
        return self.states is not None or self.error is not None

    def rows(self) -> list[slice]:
        """Return which rows of its states are those of each tree."""
        ends = np.cumsum([len(each.tree) for each in self.members]).tolist()
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class Flight:
    """A pass that goes from node to node by itself, in the threads that read their answers.

    Args:
        members: the trees, of different sequences.

    Attributes:
        members: see above.
        pieces: what they were cut into when the pass began.
        abandoned: nobody waits for it.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.pieces: list[Piece] = []
        self.abandoned = False
        self._changed = Condition()
        self._stages: tuple[Stage, ...] = ()

    def begin(self, stages: Sequence[Stage]) -> None:
        """Send the trees to the first node; again, where a node was lost.

        Those whose sequences were released meanwhile are left out. Nothing of the pass may be
        under way.
        """
        live = [each for each in self.members if not each.own.released]
        cuts = cut([len(each.tree) for each in live], len(stages) + 1)
        self._stages, self.pieces = tuple(stages), [Piece(live[piece]) for piece in cuts]
        for each in live:
            each.own.pending = None
        for piece in self.pieces:
            self._run(piece, 0, None)

    def wait(self, piece: Piece) -> Floats:
        """Return the states [sum of N, hidden] that the last node gave for a piece.

        Raises:
            StageLostError: a node was lost meanwhile.
            PacelineError: a node's engine refused the piece.
        """
        with self._changed:
            self._changed.wait_for(lambda: piece.ended)
        if isinstance(piece.error, StageLostError):
            raise StageLostError(str(piece.error))  # that of the node lives as long as the node
        if piece.error is not None:
            raise piece.error
        assert piece.states is not None
        return piece.states

    def settle(self) -> None:
        """Wait until nothing of the pass is under way, and let its sequences keep its inputs."""
        with self._changed:
            self._changed.wait_for(lambda: self.settled)
        for piece in self.pieces:
            if piece.error is not None:
                continue
            for member, rows in zip(piece.members, piece.rows(), strict=True):
                if member.own.flight is self:
                    member.own.pending = member.entry, [each[rows] for each in piece.inputs]

    def forget(self) -> None:
        """Let go of the sequences, of a pass that nobody waits for and nothing is under way of."""
        for member in self.members:
            if member.own.flight is self:
                member.own.flight = None
        for piece in self.pieces:
            piece.members, piece.error = [], None
        self.members, self.pieces = [], []

    @property
    def settled(self) -> bool:
        """Whether nothing of the pass is under way."""
        return all(piece.ended for piece in self.pieces)

    @property
    def lost(self) -> bool:
        """Whether a node was lost that had a piece of it."""
        return any(isinstance(piece.error, StageLostError) for piece in self.pieces)

    def _run(self, piece: Piece, stage: int, states: Floats | None) -> None:
        try:
            future = self._stages[stage].run([each.entry for each in piece.members], states)
        except Exception as error:  # as if the node had answered with it
            self._end(piece, error=error)
        else:
            future.add_done_callback(partial(self._answered, piece, stage))

    def _answered(self, piece: Piece, stage: int, done: Future[Floats]) -> None:
        """Take the answer of a node, in any thread; hand it to the next one."""
        error = done.exception()
        if error is not None:
            self._end(piece, error=error)
        elif stage + 1 == len(self._stages):
            self._end(piece, states=done.result())
        else:
            piece.inputs.append(done.result())
            self._run(piece, stage + 1, done.result())

    def _end(
        self, piece: Piece, states: Floats | None = None, error: BaseException | None = None
    ) -> None:
        with self._changed:
            piece.states, piece.error = states, error
            self._changed.notify_all()


def cut(sizes: list[int], stages: int) -> list[slice]:
    """Cut trees of these sizes into runs, at most one for each stage, of `PIECE` nodes or more."""
    most = max(1, min(stages, sum(sizes) // PIECE))
    pieces, start, nodes = [], 0, 0
    for index, size in enumerate(sizes):
        nodes += size
        if nodes * most >= sum(sizes) or index + 1 == len(sizes):
            pieces.append(slice(start, index + 1))
            start, nodes = index + 1, 0
    return pieces

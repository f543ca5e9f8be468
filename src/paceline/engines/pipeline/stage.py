"""A part of a model on a node, as the pipeline sees it, and the one that lies in this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from paceline.core import Floats, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.errors import ModelError, RequestError


class StageLostError(Exception):
    """A node ended, cannot be reached, or did not answer in time; its caches are gone."""


class StageEntry(NamedTuple):
    """One tree of a pass.

    Attributes:
        key: number of the sequence.
        tokens: int32 [N].
        parents: int32 [N], as those of a `TokenTree`.
    """

    key: int
    tokens: Tokens
    parents: Tokens


class Stage(ABC):
    """Runs some layers on a node, for sequences that the pipeline numbers.

    Calls take effect in their order. Those that change caches return at once; what goes wrong in
    them is reported by the next pass.

    Attributes:
        lost: why the node cannot be used any more; None: it can.
    """

    lost: StageLostError | None = None

    @abstractmethod
    def change(self, operation: str, key: int, *values: int) -> None:
        """Change caches: `open`, `release`, `truncate` (length), `fork` (new key), `commit` (path).

        Does nothing on a node that is lost.
        """

    @abstractmethod
    def run(
        self, entries: Sequence[StageEntry], states: Floats | None, answer: bool = True
    ) -> Future[Floats]:
        """Begin a pass and return its hidden states, float32 [sum of N, hidden], when it is done.

        Without `answer` only keys and values are wanted: the array is empty then.

        The future raises `StageLostError`, or the `PacelineError` of the node's engine.
        """

    def close(self) -> None:
        """End the node; twice is harmless."""


class Nodes(ABC):
    """Where the stages of a pipeline come from."""

    @abstractmethod
    def start(self, indices: Sequence[int]) -> list[Stage]:
        """Start the stages of these indices, and wait until they have loaded their layers.

        Raises:
            PacelineError: a node cannot be started or cannot load them; why, in one sentence.
            StageLostError: a node ended meanwhile.
        """

    def close(self) -> None:
        """End everything that was started."""


class StageRunner:
    """Carries out a stage's calls on an engine that holds its part of the model."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sequences: dict[int, Cached] = {}

    def change(self, operation: str, key: int, *values: int) -> None:
        """Change caches; see `Stage.change`.

        Raises:
            PacelineError: as the engine does.
        """
        if operation == "open":
            self._sequences[key] = self.engine.open()
            return
        if operation == "release":
            if key in self._sequences:
                self.engine.release(self._sequences.pop(key))
            return
        sequence = self._sequence(key)
        if operation == "commit":
            self.engine.commit(sequence, np.array(values, np.int32))
        elif operation == "truncate":
            self.engine.truncate(sequence, *values)
        elif operation == "fork":
            [other] = values
            self._sequences[other] = self.engine.fork(sequence)
        else:
            raise RequestError(f"a node was told to {operation!r:.40}, which it does not know")

    def run(
        self, entries: Sequence[StageEntry], states: Floats | None, answer: bool = True
    ) -> Floats:
        """Run a pass; see `Stage.run`. The result is a copy.

        Raises:
            PacelineError: as the engine does.
        """
        batch = [(self._sequence(entry.key), tree_of(entry)) for entry in entries]
        made = self.engine.forward_part(batch, states)
        return made.copy() if answer else made[:0].copy()

    def _sequence(self, key: int) -> Cached:
        sequence = self._sequences.get(key)
        if sequence is None:
            raise RequestError(f"a node has no sequence {key}")
        return sequence


def tree_of(entry: StageEntry) -> TokenTree:
    """Return the tree of an entry; its scores and origins do not matter to a pass."""
    count = len(entry.tokens)
    scores, origin = np.ones(count, np.float32), np.zeros(count, np.int16)
    return TokenTree(entry.tokens, entry.parents, scores, origin)


class LocalStage(Stage):
    """A stage in this process: a pass is done when `run` returns.

    Args:
        engine: holds the part.
    """

    def __init__(self, engine: Engine) -> None:
        self.runner = StageRunner(engine)

    def change(self, operation: str, key: int, *values: int) -> None:
        """Change caches at once."""
        if self.lost is None:
            self.runner.change(operation, key, *values)

    def run(
        self, entries: Sequence[StageEntry], states: Floats | None, answer: bool = True
    ) -> Future[Floats]:
        """Run a pass at once."""
        future: Future[Floats] = Future()
        if self.lost is not None:
            future.set_exception(self.lost)
            return future
        try:
            future.set_result(self.runner.run(entries, states, answer))
        except Exception as error:  # the future's to raise
            future.set_exception(error)
        return future


class LocalNodes(Nodes):
    """Stages in this process.

    Args:
        load: returns the engine of the stage with an index.
    """

    def __init__(self, load: Callable[[int], Engine]) -> None:
        self._load = load

    def start(self, indices: Sequence[int]) -> list[Stage]:
        """Load the parts of these indices."""
        return [LocalStage(self._load(index)) for index in indices]


def check_alike(who: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Refuse a node whose layers are not those of the same model, run in the same way.

    Args:
        who: names the node.
        here: what this process has, by what it is.
        there: what the node has.

    Raises:
        ModelError: they differ; names the node and what differs.
    """
    advice = {
        "files": "copy the same checkpoint to every node",
        "version": "install the same version of paceline on every node",
    }
    for name, value in here.items():
        if there.get(name) != value:
            raise ModelError(
                f"{who} has other {name} than this node: {there.get(name)!r:.80} and "
                f"{value!r:.80}, so that its layers would give other tokens; "
                f"{advice.get(name, 'start every node with the same settings')}"
            )

"""Nodes of a pipeline in threads of this process: answers come later, and nodes can be lost."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread

from paceline.engines.pipeline import Nodes, Stage, StageLostError
from paceline.engines.pipeline.stage import StageRunner
from paceline.engines.pipeline.worker import open_part
from paceline.models import load


class ThreadedStage(Stage):
    """A stage in a thread; `before(index, keys)` is called in it before each pass, `behind` after.

    Args:
        engine: holds the part.
        index: of the stage.
        nodes: that started it.
    """

    def __init__(self, engine, index, nodes):
        self.runner, self.index, self.nodes = StageRunner(engine), index, nodes
        self._calls, self._waiting, self._lock = SimpleQueue(), [], Lock()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def change(self, operation, key, *values):
        if self.lost is None:
            self._calls.put((operation, key, *values))

    def run(self, entries, states, answer=True):
        future = Future()
        with self._lock:
            if self.lost is None:
                self._waiting.append(future)
                self._calls.put((future, entries, states, answer))
                return future
        future.set_exception(self.lost)
        return future

    def lose(self, reason="a test unplugged it"):
        """End it: what it has not answered, it never will."""
        with self._lock:
            if self.lost is None:
                self.lost = StageLostError(reason)
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            future.set_exception(self.lost)

    def close(self):
        self.lose("it was closed")
        self._calls.put(None)
        self._thread.join()

    def _change(self, *call):
        try:
            self.runner.change(*call)
        except Exception as error:  # it ends, as a node does
            self.lose(f"it failed at {call[0]}: {error}")

    def _work(self):
        while (call := self._calls.get()) is not None:
            if self.lost is not None:
                continue
            if isinstance(call[0], str):
                self._change(*call)
                continue
            future, entries, states, answer = call
            keys = {entry.key for entry in entries}
            self.nodes.before(self.index, keys)
            try:
                made, error = self.runner.run(entries, states, answer), None
            except Exception as failed:
                made, error = None, failed
            self.nodes.behind(self.index, keys)
            with self._lock:
                if future not in self._waiting:
                    continue
                self._waiting.remove(future)
            if error is None:
                future.set_result(made)
            else:
                future.set_exception(error)


class ThreadedNodes(Nodes):
    """Starts stages in threads.

    Args:
        load_part: returns the engine of the stage with an index.
    """

    def __init__(self, load_part):
        self._load = load_part
        self.before = self.behind = lambda index, keys: None

    @classmethod
    def of(cls, settings):
        """What `Pipeline.launch` wants."""
        model = load(settings.model)

        def load_part(index):
            return open_part(model, settings.describe(index, "", 0, "") | {"facts": {}})

        return cls(load_part)

    def start(self, indices):
        return [ThreadedStage(self._load(index), index, self) for index in indices]

"""Nodes on a Ray cluster, of a pipeline or for prompts: actors, which connect by themselves.

Ray starts them, sees to their environment and finds a machine for a replacement. Hidden states, and
keys and values, travel over a socket of their own: a pass waits for each of them, and Ray's object
store would add two copies and a look-up to it.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paceline.engines.pipeline.remote import RemoteNodes
from paceline.engines.pipeline.settings import NodeSettings
from paceline.engines.pipeline.wire import Link
from paceline.errors import one_line


class _Node:
    """An actor that runs one node."""

    def run(self, module: str, told: dict[str, Any]) -> None:
        """Run the node of a module until whoever started it ends."""
        import_module(module).run_node(told)

    def process(self) -> int:
        """Return the id of its process, on its machine."""
        return os.getpid()


_ANSWER_SECONDS = 3.0
_HERE = 1.5  # lost nodes of another machine from which this one is taken instead
_ACTOR: Any = ray.remote(num_cpus=1, max_restarts=0, max_concurrency=2)(_Node)


class RayNodes(RemoteNodes):
    """Starts each node as an actor, on the machine that holds the fewest of them.

    Args:
        settings: what they load.
    """

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings, ray.util.get_node_ip_address())
        self._runs: dict[int, tuple[Any, Any, str]] = {}  # actor, its call, its machine
        self._lost: Counter[str] = Counter()  # nodes lost since the last start, by machine

    def connect(self, indices: Sequence[int]) -> list[Link]:
        """Start nodes; a machine that has lost some is avoided, as it may be gone."""
        links = super().connect(indices)
        self._lost.clear()
        return links

    def launch(self, index: int, told: dict[str, Any]) -> None:
        """Start an actor that calls `run_node` of the settings' module."""
        self._end(index)
        machine = self._machine()
        where = NodeAffinitySchedulingStrategy(machine, soft=True)
        actor = _ACTOR.options(scheduling_strategy=where).remote()
        self._runs[index] = actor, actor.run.remote(self.settings.module, told), machine

    def ended(self, index: int) -> str | None:
        """Return why an actor has ended."""
        _, call, _ = self._runs[index]
        ready, _ = ray.wait([call], timeout=0)
        if not ready:
            return None
        try:
            ray.get(call)
        except RayError as error:
            return f"ended: {one_line(error)}"
        return "ended"

    def process(self, index: int) -> int:
        """Return the id of a node's process, on its machine."""
        return int(ray.get(self._runs[index][0].process.remote()))

    def close(self) -> None:
        """End all actors."""
        super().close()
        for index in list(self._runs):
            self._end(index)

    def _machine(self) -> str:
        """Return the machine for one more node: another than this one, unless others lose them."""
        here = str(ray.get_runtime_context().get_node_id())
        alive = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"] and _answers(node)]
        taken = Counter(machine for _, _, machine in self._runs.values())

        def load(machine: str) -> tuple[float, str]:
            others = _HERE if machine == here else taken[machine] / (len(self._runs) + 1)
            return self._lost[machine] + others, machine

        return min(alive or [here], key=load)

    def _end(self, index: int) -> None:
        run = self._runs.pop(index, None)
        if run is None:
            return
        actor, _, machine = run
        self._lost[machine] += 1
        if ray.is_initialized():
            ray.kill(actor)


def _answers(node: dict[str, Any]) -> bool:
    """Return whether a machine takes connections; Ray learns of its end some seconds later."""
    address = str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])
    try:
        socket.create_connection(address, _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True

"""What a pipeline is, and what each of its nodes is told to load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from paceline.engines.part import Part
from paceline.engines.pipeline.stage import Nodes
from paceline.errors import RequestError


class NodeSettings(Protocol):
    """What whoever starts nodes must know of them."""

    @property
    def module(self) -> str:
        """Name the module whose `run_node(told)` a node runs."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Return what must be alike on every node, see `check_alike`."""
        ...

    @property
    def hop_seconds(self) -> float:
        """Return the seconds added to the way of every message, see `Pipeline`."""
        ...

    @property
    def silence(self) -> float:
        """Seconds without a sign of life after which a node is given up."""
        ...

    def name(self, index: int) -> str:
        """Return what a node is called in messages."""
        ...

    def describe(self, index: int, host: str, port: int, token: str) -> dict[str, Any]:
        """Return what a node needs to know, as JSON has it; see `StageSettings.describe`."""
        ...


@dataclass(frozen=True)
class StageSettings:
    """How the nodes of a pipeline open their layers.

    Attributes:
        model: path or id of the checkpoint, on every node; None is the embedded model.
        parts: layers of each node, then those of this process.
        engine, threads, device, weight_format, kv_format, weights_memory, rope: as for `LM`.
        facts: what must be alike on every node, see `check_alike`.
        hop_seconds: see `Pipeline`.
        silence: see `Pipeline`.
    """

    model: str | None
    parts: tuple[Part, ...]
    engine: str
    threads: int | None
    device: str | None
    weight_format: str
    kv_format: str
    weights_memory: int | None
    rope: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    hop_seconds: float = 0.0
    silence: float = 60.0

    @property
    def module(self) -> str:
        """Whose `run_node` a node runs."""
        return "paceline.engines.pipeline.worker"

    def name(self, index: int) -> str:
        """Return what a node is called in messages."""
        return f"node {index + 1} ({self.parts[index]})"

    def describe(self, index: int, host: str, port: int, token: str) -> dict[str, Any]:
        """Return what a node needs to know, as JSON has it.

        Args:
            index: of the node.
            host: address where the pipeline accepts its connection.
            port: of that address.
            token: proves that it is the one that was started.
        """
        told = asdict(self) | {"part": asdict(self.parts[index]), "index": index}
        del told["parts"]
        return told | {"host": host, "port": port, "token": token}


@dataclass(frozen=True)
class Pipeline:
    """Layers over several nodes.

    Attributes:
        nodes: number of them, this process included.
        launch: starts the others; None: they are processes on this machine.
        hop_seconds: added to the way of every message, to see what a slower network would cost;
            on one machine only.
        silence: seconds without a sign of life after which a node is given up.
        passes_in_flight: passes of different requests that are under way at once; None: as many
            as there are nodes, so that all can work at once; 1: one after the other.

    Raises:
        RequestError: a value is out of range.
    """

    nodes: int
    launch: Callable[[StageSettings], Nodes] | None = None
    hop_seconds: float = 0.0
    silence: float = 60.0
    passes_in_flight: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.nodes, int) or isinstance(self.nodes, bool):
            raise RequestError(f"the pipeline is {self.nodes!r:.40}, expected a number of nodes")
        if not 2 <= self.nodes <= 64:
            raise RequestError(
                f"the pipeline has {self.nodes} nodes, expected 2 to 64, this process included"
            )
        if not 0 <= self.hop_seconds <= 10:
            raise RequestError(f"hop_seconds is {self.hop_seconds}, expected 0 to 10")
        if not 1 <= self.silence <= 3600:
            raise RequestError(f"silence is {self.silence} seconds, expected 1 to 3600")
        if self.passes_in_flight is not None and not 1 <= self.passes_in_flight <= 64:
            raise RequestError(f"passes_in_flight is {self.passes_in_flight}, expected 1 to 64")

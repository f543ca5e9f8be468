"""What prefill replicas are, what each is told to load, and what does not go with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from paceline.abilities import Ability
from paceline.compatibility import Side, check, check_needs
from paceline.engines.base import Engine
from paceline.engines.page_store import cache_identity
from paceline.engines.pipeline import PipelineEngine
from paceline.engines.pipeline.remote import RemoteNodes
from paceline.engines.pipeline.settings import NodeSettings
from paceline.engines.pipeline.worker import facts_of
from paceline.engines.sides import engine_sides
from paceline.errors import RequestError
from paceline.models import Model

WHO = "prefill replicas"
THRESHOLD = 256  # tokens: fewer are one pass of a server without streams, and hardly delay others
MOST = 64


@dataclass(frozen=True)
class PrefillSettings:
    """How prefill replicas open the model; what they are told is what this process did.

    Attributes:
        model: path or id of the checkpoint where the replicas run; None is the embedded model.
        engine, threads, device, weight_format, kv_format, weights_memory, rope: as for `LM`.
        memory: most bytes of each replica's process; None: see `kv_budget.default_room`.
        facts: what must be alike, see `check_alike`.
        hop_seconds: added to the way of every message, to see what a slower network would cost.
        silence: seconds without a sign of life after which a replica is given up.
    """

    model: str | None = None
    engine: str = "auto"
    threads: int | None = None
    device: str | None = None
    weight_format: str = "auto"
    kv_format: str = "auto"
    weights_memory: int | None = None
    rope: str | None = None
    memory: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    hop_seconds: float = 0.0
    silence: float = 15.0

    @property
    def module(self) -> str:
        """Whose `run_node` a replica runs."""
        return "paceline.serving.prefill.node"

    def name(self, index: int) -> str:
        """Return what a replica is called in messages."""
        return f"prefill replica {index + 1}"

    def describe(self, index: int, host: str, port: int, token: str) -> dict[str, Any]:
        """Return what a replica needs to know, as JSON has it; see `StageSettings.describe`."""
        return asdict(self) | {"index": index, "host": host, "port": port, "token": token}

    def of(self, model: Model, engine: Engine) -> PrefillSettings:
        """Return the settings with the facts of the model that this process runs.

        Raises:
            ModelError: a file cannot be read.
        """
        source = self.model
        if source is not None and Path(source).exists():
            source = str(Path(source).resolve())
        return replace(self, model=source, facts=prefill_facts(model, engine))


@dataclass(frozen=True)
class Prefill:
    """Prefill replicas of a server.

    Attributes:
        replicas: number of them.
        threshold: tokens that a text must lack at least to be read by one.
        launch: starts them; None: they are processes on this machine.

    Raises:
        RequestError: a value is out of range.
    """

    replicas: int
    threshold: int = THRESHOLD
    launch: Callable[[NodeSettings], RemoteNodes] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MOST:
            raise RequestError(f"there are {self.replicas} {WHO}, expected 1 to {MOST}")
        if self.threshold < 1:
            raise RequestError(
                f"the threshold of {WHO} is {self.threshold} tokens, expected 1 or more"
            )


def prefill_facts(model: Model, engine: Engine) -> dict[str, Any]:
    """Return what must be alike in two processes whose pages have the same bits.

    Raises:
        ModelError: a file cannot be read.
    """
    identity = cache_identity(engine, model.digest())
    return facts_of(model, engine) | {"keys and values": identity.hex()}


def check_prefill(engine: Engine, kv_policy: str | None = None, cut: bool = False) -> None:
    """Refuse an engine whose pages cannot be computed elsewhere.

    Args:
        engine: of this process.
        kv_policy: name of the policy that all requests are under; None: requests have none.
        cut: a nested checkpoint was cut to a size.

    Raises:
        CombinationError: names both and the reason.
    """
    sides = {Side.PREFILL_APART: WHO, **engine_sides(engine)}
    if isinstance(engine, PipelineEngine):
        sides[Side.PIPELINE] = "a pipeline"
    if kv_policy is not None:
        sides[Side.KV_POLICY] = f"the KV policy {kv_policy} of all requests"
    if cut:
        sides[Side.NESTED_MEMORY] = "weight_memory"
    check(sides)
    check_needs(WHO, {Ability.STORED_PAGES}, engine.name, engine.abilities)

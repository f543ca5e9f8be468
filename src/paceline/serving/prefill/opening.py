"""Starts the prefill replicas of a server."""

from __future__ import annotations

from paceline.engines.base import Engine
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.models import Model
from paceline.serving.prefill.pool import PrefillPool
from paceline.serving.prefill.settings import Prefill, PrefillSettings


def open_prefill(
    model: Model, engine: Engine, prefill: Prefill, settings: PrefillSettings
) -> PrefillPool:
    """Start prefill replicas of a model that is open here, and wait until they are ready.

    Args:
        model: the checkpoint here.
        engine: runs it here.
        prefill: number of replicas, and how they are started.
        settings: how this process has opened the model; facts are added here.

    Raises:
        PacelineError: a replica cannot be started, or has other files; in one sentence.
    """
    nodes = (prefill.launch or ProcessNodes)(settings.of(model, engine))
    return PrefillPool(nodes, prefill.replicas, engine, prefill.threshold)

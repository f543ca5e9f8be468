"""Opens a checkpoint as a pipeline."""

from __future__ import annotations

from pathlib import Path

from paceline.engines.factory import open_engine
from paceline.engines.part import split_layers
from paceline.engines.pipeline.engine import PipelineEngine
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.engines.pipeline.settings import Pipeline, StageSettings
from paceline.engines.pipeline.worker import facts_of
from paceline.models import Model


def open_pipeline(
    model: Model,
    source: str | Path | None,
    pipeline: Pipeline,
    engine: str,
    *,
    threads: int | None,
    device: str | None,
    weight_format: str,
    kv_format: str,
    weights_memory: int | None,
    rope: str | None,
) -> PipelineEngine:
    """Open a checkpoint on several nodes; the last layers in this process.

    Args:
        model: the checkpoint here, its context extended by `rope`.
        source: its path or id on every node.
        pipeline: number of nodes, and how they are started.
        engine: of every node, as for `LM`; so are the others.
        threads: of each node; None takes its cores, also where nodes share a machine: with one
            request most of the time one of them computes.
        device: of the torch engine.
        weight_format: `dtype` of `LM`.
        kv_format: of cached keys and values.
        weights_memory: of each node, in bytes.
        rope: extends the context.

    Raises:
        PacelineError: a node cannot be started, or has other files; in one sentence.
    """
    parts = split_layers(model.config, pipeline.nodes)
    native = engine in ("auto", "native") and device is None
    last = open_engine(
        model,
        engine,
        threads=threads if native else None,
        device=device,
        weight_format=weight_format,
        kv_format=kv_format,
        weights_memory=weights_memory,
        part=parts[-1],
    )
    there = str(Path(source).resolve()) if source is not None and Path(source).exists() else source
    settings = StageSettings(
        None if there is None else str(there),
        tuple(parts),
        engine,
        threads if last.name == "native" else None,
        device,
        weight_format,
        kv_format,
        weights_memory,
        rope,
        facts_of(model, last),
        pipeline.hop_seconds,
        pipeline.silence,
    )
    nodes = (pipeline.launch or ProcessNodes)(settings)
    return PipelineEngine(model.config, last, nodes, len(parts) - 1, pipeline.passes_in_flight)

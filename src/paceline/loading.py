"""Opens checkpoints in engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from paceline import registry
from paceline.arguments import check_integer, check_size, check_text, described, wrong
from paceline.attention.base import Pattern
from paceline.compatibility import Side, check
from paceline.decoding.governor import Budget, Fixed, governor_of
from paceline.engines import open_engine
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine, parse_ensemble
from paceline.engines.factory import open_nested
from paceline.engines.pipeline.opening import open_pipeline
from paceline.engines.pipeline.settings import Pipeline
from paceline.errors import ModelError, RequestError
from paceline.exits.base import ExitPolicy
from paceline.models import Model, load
from paceline.models.extension import extend_context
from paceline.models.nested import parse_memory
from paceline.models.tokenizer import same_tokens
from paceline.models.trace import Trace, known_trace


class LoadedModel(NamedTuple):
    """A checkpoint and the engine that runs it.

    Attributes:
        model: the checkpoint; the first one of an ensemble.
        engine: runs it, or all models of the ensemble.
        trace: texts and predictions that `paceline warm` kept, if any; None for an ensemble.
    """

    model: Model
    engine: Engine
    trace: Trace | None


def open_model(
    source: str | Path | None,
    engine: str,
    *,
    threads: int | None,
    device: str | None,
    weight_format: str,
    kv_format: str,
    memory: int | str | None = None,
    attention: str | Pattern | None = None,
    exits: str | ExitPolicy | None = None,
    rope: str | None = None,
    weights_memory: int | str | None = None,
    pipeline: int | Pipeline | None = None,
) -> LoadedModel:
    """Open a checkpoint, or several as an ensemble, with the arguments of `LM`.

    Raises:
        ModelError, MethodError, RequestError: what is wrong and what to do, in one sentence.
    """
    if source is not None and not isinstance(source, str | Path):
        raise wrong("the model", source, "a folder, a hub id, or None for the embedded model")
    for name, value in (("engine", engine), ("dtype", weight_format), ("kv_format", kv_format)):
        check_text(name, value)
    threads = None if threads is None else check_integer("threads", threads)
    device = None if device is None else check_text("device", device)
    pattern = registry.patterns.parse(attention) if isinstance(attention, str) else attention
    if pattern is not None and not isinstance(pattern, Pattern):
        raise wrong("attention", attention, "a name or a Pattern")
    policy = registry.exits.parse(exits) if isinstance(exits, str) else exits
    if policy is not None and not isinstance(policy, ExitPolicy):
        raise wrong("exits", exits, "a name or an ExitPolicy")
    parts = parse_ensemble(source) if isinstance(source, str) else [(source, 1.0)]
    size = None if memory is None else parse_memory("memory", memory)
    budget = None if weights_memory is None else check_size("weights_memory", weights_memory)
    if (size is not None or budget is not None) and len(parts) > 1:
        which = "weights_memory" if size is None else "memory"
        raise RequestError(
            f"{which} is that of one checkpoint, and {len(parts)} are named; leave it out, or name "
            "one"
        )
    nodes = None
    if pipeline is not None:
        nodes = _nodes(pipeline, pattern, policy, len(parts), size is not None)
    models = [load(part, size) for part, _ in parts]
    open_one = open_engine if size is None else open_nested
    if rope is not None:
        check_text("rope", rope)
        models = [replace(each, config=extend_context(each.config, rope)) for each in models]
    with _opening_tokenizers(models):
        if nodes is not None:
            split = open_pipeline(
                models[0],
                parts[0][0],
                nodes,
                engine,
                threads=threads,
                device=device,
                weight_format=weight_format,
                kv_format=kv_format,
                weights_memory=budget,
                rope=rope,
            )
            return LoadedModel(models[0], split, known_trace(models[0], split.config.vocab_size))
        engines = [
            open_one(
                each,
                engine,
                threads=threads,
                device=device,
                weight_format=weight_format,
                kv_format=kv_format,
                pattern=pattern,
                weights_memory=budget,
                exits=policy,
            )
            for each in models
        ]
    if len(models) > 1:
        _check_tokens(models)
        whole = EnsembleEngine(engines, [weight for _, weight in parts])
        return LoadedModel(models[0], whole, None)
    [only] = engines
    return LoadedModel(models[0], only, known_trace(models[0], only.config.vocab_size))


def _nodes(
    pipeline: int | Pipeline,
    pattern: Pattern | None,
    exits: ExitPolicy | None,
    models: int,
    cut: bool,
) -> Pipeline:
    """Return the nodes of a pipeline, if the model can be opened on them.

    Raises:
        RequestError, MethodError: it cannot.
    """
    if not isinstance(pipeline, Pipeline):
        pipeline = Pipeline(check_integer("pipeline", pipeline))
    sides = {Side.PIPELINE: f"pipeline={pipeline.nodes}"}
    if pattern is not None:
        sides[Side.PATTERN] = f"the attention pattern {pattern.name}"
    if exits is not None:
        sides[Side.EXITS] = f"the exit policy {exits.name}"
    if models > 1:
        sides[Side.SEVERAL_MODELS] = f"{models} models"
    if cut:
        sides[Side.NESTED_MEMORY] = "memory"
    check(sides)
    return pipeline


def open_budget(budget: int | str, engine: Engine) -> Budget:
    """Return what sizes draft trees: a fixed number, or `auto` by this machine's measured cost.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return Fixed(budget)
    if not isinstance(budget, str) or budget != "auto":
        raise RequestError(f"the budget is {described(budget)}, expected a number of nodes or auto")
    from paceline.engines.cost_cache import cost_of

    return governor_of(engine, cost_of(engine))


@contextmanager
def _opening_tokenizers(models: list[Model]) -> Iterator[None]:
    """Open the tokenizers in a thread of their own while the weights are read.

    What is wrong with one is told when it is used.
    """

    def open_all() -> None:
        for model in models:
            with suppress(ModelError):
                _ = model.tokenizer

    thread = Thread(target=open_all, name="paceline-tokenizer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _check_tokens(models: list[Model]) -> None:
    first, *others = models
    for other in others:
        if not same_tokens(first.tokenizer, other.tokenizer):
            raise ModelError(
                f"{first.name} and {other.name} have other tokens; an ensemble needs "
                "models with the same tokenizer"
            )

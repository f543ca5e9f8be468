"""Open a model in an engine."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from paceline.compatibility import Side, check
from paceline.engines.base import Engine
from paceline.engines.collaborators import AttentionPattern, LayerExits
from paceline.engines.kv_formats import GROUPED_KV, grouped_format
from paceline.engines.part import Part
from paceline.engines.sides import has_rectified_neurons, model_sides
from paceline.errors import MethodError, unknown
from paceline.models.tensors import Nested, RoundedInputs

if TYPE_CHECKING:
    import torch

    from paceline.models import Model

STORED = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}  # in files -> in engines
KEPT = "stored"  # matrices stay in their stored form, in the reference engine
NAMES = ("auto", "native", "reference", "static")


def open_like(engine: Engine | None, model: Model, weight_format: str = "auto") -> Engine:
    """Open a second model in an engine of the kind, threads and device of `engine`."""
    if engine is None:
        return open_engine(model, weight_format=weight_format)
    return open_engine(
        model,
        engine.name if engine.name in NAMES else "auto",
        threads=engine.threads,
        device=engine.device,
        weight_format=weight_format,
    )


def open_engine(
    model: Model,
    name: str = "auto",
    *,
    threads: int | None = None,
    device: str | None = None,
    weight_format: str = "auto",
    kv_format: str = "auto",
    kv_limit: int | None = None,
    pattern: AttentionPattern | None = None,
    weights_memory: int | None = None,
    part: Part | None = None,
    exits: LayerExits | None = None,
) -> Engine:
    """Open an engine and load the model's weights into it.

    Args:
        model: a checkpoint.
        name: one of `NAMES`; `auto` is native unless a device or the format `stored` is named.
        threads: of the native engine; None uses the cores this process may use.
        device: of the torch engines, reference and static; None is the CPU.
        weight_format: how the weights are stored, see `formats`; `auto` keeps the checkpoint's
            format, in the torch engines fp32; `stored` expands each matrix only while its layer
            runs, in the reference engine. `act=int8` beside it rounds activations to
            8 bits, `act=auto` where that costs little.
        kv_format: how the native engine caches keys and values; `auto` is fp32, which rounds
            nothing. The reference engine has int4, int3 and gear besides the format of its weights.
        pattern: attention pattern; of the native engine one that chooses runs of positions.
        kv_limit: upper limit of cached keys and values in bytes, see `Engine.kv_limit`.
        weights_memory: most bytes of weights in memory, of the native engine, see `NativeEngine`,
            and of the reference engine for models with ReLU, see `NeuronWindow`.
        part: layers that the engine runs, see `Engine.forward_part`; None: all.
        exits: which layers each token runs, of the reference engine.

    Raises:
        MethodError: the name is unknown, the engine has no such setting, or torch is missing.
    """
    if name not in NAMES:
        raise MethodError(unknown("engine", name, NAMES))
    rounds = RoundedInputs.__name__.lower() in model.weights.formats()
    if rounds and name not in ("auto", "reference"):
        raise MethodError(
            f"{model.name} rounds activations, which the {name} engine has no products for; take "
            "the engine auto or reference"
        )
    by_default = name == "auto" and (device is not None or weight_format == KEPT or rounds)
    if name in ("reference", "static") or by_default:
        static = name == "static"
        kind, called = (Side.STATIC, name) if static else (Side.REFERENCE, "reference")
        sides = {kind: f"the {called} engine", **model_sides(model.config)}
        if part is not None:
            sides[Side.PIPELINE] = "a pipeline"
        if threads is not None:
            sides[Side.THREADS] = f"threads={threads}"
        if kv_format != "auto" and (static or grouped_format(kv_format) is None):
            sides[Side.KV_FORMAT] = f"kv_format={kv_format}"
        elif kv_format != "auto":
            sides[Side.GROUPED_KV] = f"kv_format={kv_format}"
        if pattern is not None:
            sides[Side.PATTERN] = f"the attention pattern {pattern.name}"
        if weights_memory is not None:
            windowed = has_rectified_neurons(model.config, model.weights) and not rounds
            if static or weight_format == KEPT or not windowed:
                sides[Side.STREAMED_WEIGHTS] = "weights_memory"
        if exits is not None:
            sides[Side.EXITS] = f"the exit policy {exits.name}"
        check(sides)
        place = "cpu" if device is None else device
        if static:
            return _static(model, place, weight_format, kv_limit)
        return _reference(
            model,
            place,
            weight_format,
            kv_format,
            kv_limit,
            pattern,
            part,
            exits,
            weights_memory,
        )
    sides = {Side.NATIVE: "the native engine", **model_sides(model.config)}
    if pattern is not None:
        native = pattern.sparse_prefill or pattern.few_read
        kind = Side.PATTERN if native else Side.MASK_PATTERN
        sides[kind] = f"the attention pattern {pattern.name}"
        if kv_format in GROUPED_KV:
            sides[Side.GROUPED_KV] = f"kv_format={kv_format}"
    if grouped_format(kv_format) is not None and kv_format not in GROUPED_KV:
        sides[Side.LOW_RANK_KV] = f"kv_format={kv_format}"
    if device is not None:
        sides[Side.DEVICE] = f"device={device}"
    if exits is not None:
        sides[Side.EXITS] = f"the exit policy {exits.name}"
    check(sides)
    kept = "fp32" if kv_format == "auto" else kv_format
    return _native(model, threads, weight_format, kept, kv_limit, pattern, weights_memory, part)


def open_nested(
    model: Model,
    name: str,
    *,
    threads: int | None,
    device: str | None,
    weight_format: str,
    kv_format: str,
    pattern: AttentionPattern | None,
    weights_memory: int | None = None,
    exits: LayerExits | None = None,
) -> Engine:
    """Open a model whose nested matrices were cut to a memory, in an engine that stays within it.

    That is the native one where it has kernels for them as they are stored, otherwise the reference
    engine with the format `stored`. Arguments are those of `open_engine`.

    Raises:
        MethodError: the engine or format that is named would expand them; as `open_engine`.
    """
    from paceline.engines.native_weights import expands

    nested = any(
        isinstance(matrix := model.weights.stored(each), Nested) and expands(matrix)
        for each in model.weights
    )
    expanding = name in ("native", "static")
    if nested and (expanding or weight_format not in ("auto", KEPT)):
        chosen = f"the {name} engine" if expanding else f"the format {weight_format}"
        raise MethodError(
            f"{chosen} would expand the blocks of {model.name} beyond the memory; leave the "
            "memory out, or engine and format"
        )
    return open_engine(
        model,
        name,
        threads=threads,
        device=device,
        weight_format=KEPT if nested else weight_format,
        kv_format=kv_format,
        pattern=pattern,
        weights_memory=weights_memory,
        exits=exits,
    )


def _reference(
    model: Model,
    device: str,
    weight_format: str,
    kv_format: str,
    kv_limit: int | None,
    pattern: AttentionPattern | None,
    part: Part | None,
    exits: LayerExits | None,
    weights_memory: int | None,
) -> Engine:
    dtype = _torch_dtype("reference", weight_format, KEPT)
    from paceline.engines.exiting import ExitingEngine
    from paceline.engines.reference import ReferenceEngine

    opened = ReferenceEngine if exits is None else partial(ExitingEngine, exits)
    return opened(
        model.config,
        model.weights,
        device=device,
        dtype=dtype,
        kv_limit=kv_limit,
        pattern=pattern,
        stored=weight_format == KEPT,
        kv_format=kv_format,
        part=part,
        weights_memory=weights_memory,
    )


def _static(model: Model, device: str, weight_format: str, kv_limit: int | None) -> Engine:
    dtype = _torch_dtype("static", weight_format)
    from paceline.engines.static import StaticEngine

    engine = StaticEngine(model.config, model.weights, device=device, dtype=dtype)
    if kv_limit is not None:
        engine.kv_limit = kv_limit
    return engine


def _torch_dtype(engine: str, weight_format: str, *others: str) -> torch.dtype:
    try:
        from paceline.engines.reference import DTYPES
    except ModuleNotFoundError as error:
        raise MethodError(f"the {engine} engine needs torch; install paceline[torch]") from error
    dtype = DTYPES.get("fp32" if weight_format in ("auto", *others) else weight_format)
    if dtype is None:
        raise MethodError(
            f"the {engine} engine has no format {weight_format!r}; "
            f"expected auto, {', '.join([*DTYPES, *others])}"
        )
    return dtype


def _native(
    model: Model,
    threads: int | None,
    weight_format: str,
    kv_format: str,
    kv_limit: int | None,
    pattern: AttentionPattern | None,
    weights_memory: int | None,
    part: Part | None,
) -> Engine:
    from paceline.engines.formats import NotTernaryError, split_activations, with_activations
    from paceline.engines.native import NativeEngine

    if weight_format == KEPT:
        raise MethodError(
            "the native engine keeps the forms that it has kernels for, and has no format "
            f"{KEPT!r}; take the reference engine, or leave the format out"
        )
    weight_format, act = split_activations(weight_format)

    def load(name: str) -> Engine:
        return NativeEngine(
            model.config,
            model.weights,
            threads=threads,
            format=with_activations(name, act),
            kv_format=kv_format,
            kv_limit=kv_limit,
            pattern=pattern,
            weights_memory=weights_memory,
            part=part,
        )

    if weight_format != "auto":
        return load(weight_format)
    if model.config.family == "bitnet":
        stored = set(model.weights.formats())
        kept = STORED.get(stored.pop(), "fp32") if len(stored) == 1 else "fp32"
        # Parts must not decide apart from each other, so that there a layer that is not is refused.
        with suppress(*((NotTernaryError,) if part is None else ())):
            return load(f"ternary:head={kept}")
    return load("auto")

"""Packed 4-bit checkpoints beside `--format int4`: bytes, and milliseconds of a pass.

    python benchmarks/packed.py [--shape 135m|1.1b] [--threads N] [--group 64] [--repeat 15]

Writes a checkpoint of random weights in every layout (compressed-tensors, GPTQ, AWQ), opens each as
it is stored, and the same weights in `int4`, all with the head in bf16. Passes over n nodes take
turns in one process; times are medians. What the engine holds is compared with the file bit for
bit before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from step import SHAPES, RandomWeights, draw

from paceline import _native
from paceline.core import Floats, TokenTree
from paceline.engines import open_engine
from paceline.engines.native import NativeEngine, default_threads
from paceline.models import load
from paceline.models.config import ModelConfig
from paceline.models.formats import compressed_tensors
from paceline.models.formats.awq import AWQLayout
from paceline.models.formats.gptq import GPTQLayout
from paceline.models.formats.writer import Pending, type_name, write_json, write_safetensors
from paceline.models.tensors import Grouped, Linear

SIZES = (1, 8, 32)
MODULES = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
LAYOUTS = ("compressed-tensors", "gptq", "awq")


def rounded(matrix: Floats, group: int, zeros: bool) -> Grouped:
    """Round to 4 bits with fp16 scales, about zero or with zero points."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    size = (high - low) / 15 if zeros else np.maximum(high, -low) / 7
    scales = np.maximum(size, 1e-6).astype(np.float16).astype(np.float32)
    points = np.clip(np.rint(-low / scales), 0, 15) if zeros else np.full(scales.shape, 8.0)
    codes = np.clip(np.rint(groups / scales[..., None]) + points[..., None], 0, 15)
    return Grouped(
        4,
        codes.astype(np.uint8).reshape(rows, columns),
        scales,
        group,
        points.astype(np.uint16) if zeros else None,
        scale_type="F16",
    )


def parts(module: str, matrix: Floats, layout: str, group: int) -> dict[str, Any]:
    """Return the tensors of a linear map in a layout."""
    if layout == "compressed-tensors":
        packed = compressed_tensors.pack(matrix, 4, group)
        return {f"{module}.weight{name}": part for name, part in packed.items()}
    saver = GPTQLayout(4, group).save if layout == "gptq" else AWQLayout(group).save
    saved = saver(rounded(matrix, group, layout == "awq"))
    return {f"{module}.{name}": part for name, part in saved.items()}


def scheme(layout: str, group: int) -> dict[str, Any]:
    """Return the `quantization_config` of a layout."""
    if layout == "compressed-tensors":
        return compressed_tensors.scheme(4, group)
    return {"quant_method": layout, "bits": 4, "group_size": group, "zero_point": layout == "awq"}


def bf16(values: Floats) -> Any:
    """Return the upper halves of float32 values, the bits of bfloat16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write(folder: Path, config: ModelConfig, layout: str, group: int) -> None:
    """Write a checkpoint of random weights, its linear maps packed, the rest in bf16."""
    tensors: dict[str, Any] = {}
    for name, values in RandomWeights(config).items():
        _, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if part in MODULES:
            module = f"model.layers.{index}.{MODULES[part]}"
            tensors |= parts(module, values, layout, group)
        elif part in NORMS:
            tensors[f"model.layers.{index}.{NORMS[part]}.weight"] = bf16(values)
        else:
            module = {"embed": "embed_tokens", "final_norm": "norm"}[name]
            tensors[f"model.{module}.weight"] = bf16(values)
    pending = {
        name: Pending(
            array.shape,
            lambda array=array: array,
            "BF16" if array.dtype == np.uint16 else type_name(array.dtype),
        )
        for name, array in tensors.items()
    }
    write_safetensors(folder / "model.safetensors", pending)
    layer = config.layers[0]
    settings = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": layer.intermediate,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": True,
        "quantization_config": scheme(layout, group),
    }
    write_json(folder / "config.json", settings)


def open_packed(config: ModelConfig, layout: str, group: int, threads: int) -> NativeEngine:
    """Open a checkpoint as it is stored, and check that every matrix is the file's."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), config, layout, group)
        model = load(folder)
        engine = open_engine(model, threads=threads)
        assert isinstance(engine, NativeEngine)
        for name in model.weights:
            if isinstance(model.weights[name], Linear):
                np.testing.assert_array_equal(engine.dense(name), model.weights.dense(name))
    return engine


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    config = SHAPES[options.shape]
    engines = {
        "int4, rounded when loaded": NativeEngine(
            config, RandomWeights(config), options.threads, "int4:head=bf16"
        )
    }
    for layout in LAYOUTS:
        engines[layout] = open_packed(config, layout, options.group, options.threads)
    sequences = {name: each.start(draw(each, 64)) for name, each in engines.items()}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeat + 1):
        for n in SIZES:
            for name, engine in engines.items():
                tree = TokenTree.chain(draw(engine, n))
                start = time.perf_counter()
                engine.forward([(sequences[name], tree)])
                times.setdefault((name, n), []).append(time.perf_counter() - start)
    isa = next(iter(engines.values())).isa
    bandwidth = _native.read_bandwidth(options.threads) / 1e9
    print(f"{options.shape}, {isa}, {options.threads} threads, groups of {options.group};")
    print(f"medians of {options.repeat}; memory {bandwidth:.1f} GB/s\n")
    print("| checkpoint | held as | MB |" + "".join(f" ms, n = {n} |" for n in SIZES))
    print("|---|---|---:|" + "---:|" * len(SIZES))
    for name, engine in engines.items():
        cells = [f"{statistics.median(times[name, n][1:]) * 1e3:.2f}" for n in SIZES]
        size = engine.weight_bytes / 1e6
        print(f"| {name} | {engine.format} | {size:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

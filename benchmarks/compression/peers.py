r"""Bits against loss of llama.cpp's own quantiser on shuffled bases, as `frontier.py` tells it.

    python benchmarks/compression/peers.py BASE [BASE ...] [--type Q4_K_M ...] [--windows 20] \
        [--cache FILE] [--imatrix] [--calibration FILE]

Each base is written as a GGUF file of float32, quantised by `llama_model_quantize` of the package
llama-cpp-python, read by Paceline and scored as the recipes of `frontier.py` are, with the same
cache. Embedding and head stay float32, as there. With --imatrix llama.cpp gets the mean squares of
the inputs of each matrix on the calibration texts of `paceline compress`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from paceline.compress.calibrate import calibration
from paceline.compress.checkpoint import stored_size
from paceline.core import Floats
from paceline.models import Model, load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import parse_gguf_format

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compression.frontier import add_settings, is_known, key_of, print_table, row, score, speed
from llama_cpp import Library

from paceline.measuring.quality import paired

TYPES = {  # llama_ftype
    **{"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_0": 8, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2},
    **{"IQ4_XS": 30, "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "Q2_K": 10},
}
DEFAULT = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
_NAMES = {  # canonical -> GGUF
    **{name: f"attn_{name}" for name in ("q", "k", "v")},
    **{name: f"ffn_{name}" for name in ("gate", "up", "down")},
    "o": "attn_output",
}


class _Importance(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class _Params(ctypes.Structure):
    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "copy", "pure", "split")),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        *((name, ctypes.c_void_p) for name in ("kv", "tensors", "layers")),
        ("opaque", ctypes.c_ubyte * 256),
    )


class Quantizer:
    """llama.cpp's own.

    Raises:
        SystemExit: llama-cpp-python is not installed, or its interface is not the one known here.
    """

    def __init__(self) -> None:
        library = Library("llama-cpp-python")
        self.build, self._c = library.build, library.c
        self._c.llama_model_quantize_default_params.restype = _Params
        self._c.llama_model_quantize.argtypes = (
            *(ctypes.c_char_p, ctypes.c_char_p),
            ctypes.POINTER(_Params),
        )
        params = self._c.llama_model_quantize_default_params()
        found = (params.nthread, params.requantize, params.output, params.pure, params.dry_run)
        if found != (0, False, True, False, False) or params.imatrix:
            raise SystemExit(f"{self.build} has other settings than known here: {found}")

    def run(self, source: Path, out: Path, kind: str, importance: Mapping[str, Floats]) -> None:
        """Quantise a file, embedding and head not."""
        params = self._c.llama_model_quantize_default_params()
        params.ftype, params.nthread = TYPES[kind], 2
        params.output_tensor_type = params.token_embedding_type = 0  # F32
        entries = (_Importance * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if importance:
            params.imatrix = entries
        if self._c.llama_model_quantize(str(source).encode(), str(out).encode(), params):
            raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


def importance_of(model: Model, asked: SimpleNamespace) -> dict[str, Floats]:
    """Return the mean squares of the inputs of each matrix by its name in GGUF, float32 [in]."""
    import torch

    from paceline.models import blocks

    config, weights = model.config, model.weights
    texts = calibration(model, asked.calibration, asked.rows, asked.length, asked.seed)
    outer = {
        name: torch.from_numpy(weights.dense(name))
        for name in weights
        if not name.startswith("layers.")
    }
    start = "layers.{}."
    layers = [
        {
            name.removeprefix(start.format(index)): torch.from_numpy(weights.dense(name))
            for name in weights
            if name.startswith(start.format(index))
        }
        for index in range(len(config.layers))
    ]
    sums: dict[str, Any] = {}

    def tap(index: int, name: str, x: torch.Tensor) -> None:
        followers = {"q": ("q", "k", "v"), "gate": ("gate", "up")}.get(name, (name,))
        for each in followers:
            key = f"blk.{index}.{_NAMES[each]}.weight"
            sums[key] = sums.get(key, 0) + x.reshape(-1, x.shape[-1]).square().sum(0)

    with torch.no_grad():
        for rows in np.array_split(texts.tokens, len(texts.tokens) // 8 or 1):
            blocks.logits(torch.from_numpy(rows), config, outer, layers, tap)
    return {
        name: np.ascontiguousarray((total / texts.tokens.size).numpy(), np.float32)
        for name, total in sums.items()
    }


def judge(
    base: Path, kinds: list[str], asked: SimpleNamespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each type with its bits, bytes and loss on a base."""
    quantizer = Quantizer()
    whole = score(base, asked.windows)
    model = load(base)
    importance = importance_of(model, asked) if asked.imatrix else {}
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        source, out = Path(folder) / "f32.gguf", Path(folder) / "out.gguf"
        GGUFExport(model, parse_gguf_format("f32")).write(source)
        for kind in kinds:
            quantizer.run(source, out, kind, importance)
            size = stored_size(load(out))
            loss = paired(score(out, asked.windows), whole)
            fast = speed(out) if asked.speed else None
            yield kind, row(size.bits_per_weight, size.total, loss, fast)
            if asked.keep:
                out.replace(Path(asked.keep) / f"{base.name}-{kind.lower()}.gguf")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bases", nargs="+", type=Path)
    parser.add_argument("--type", action="append", choices=TYPES, dest="types")
    parser.add_argument("--imatrix", action="store_true")
    parser.add_argument("--scratch", help="folder for files of the base's size")
    add_settings(parser)
    asked: SimpleNamespace = parser.parse_args(namespace=SimpleNamespace())
    known = json.loads(asked.cache.read_text()) if asked.cache and asked.cache.exists() else {}
    names = {kind: _title(kind, asked) for kind in asked.types or DEFAULT}
    for base in asked.bases:
        keys = {kind: key_of(base, name, asked) for kind, name in names.items()}
        new = [kind for kind, key in keys.items() if not is_known(known, key, asked)]
        for kind, found in judge(base, new, asked) if new else ():
            known[keys[kind]] = found
            if asked.cache:
                asked.cache.write_text(json.dumps(known, indent=1))
    print_table(
        {
            name: [known[key_of(base, name, asked)] for base in asked.bases]
            for name in names.values()
        }
    )


def _title(kind: str, asked: SimpleNamespace) -> str:
    return f"llama.cpp {kind}" + (" with imatrix" if asked.imatrix else "")


if __name__ == "__main__":
    main()

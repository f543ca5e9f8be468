"""Write a Llama as a GGUF file, so that llama.cpp can run the very weights that we run.

A tokenizer is in it only where one is given: most benchmarks feed token numbers. Matrices are F16,
Q8_0 or Q4_0, the embedding included, with the rounding of llama.cpp's reference quantisers; norms
stay F32. Tensors are written one after the other, so memory peaks at one matrix.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.models.config import ModelConfig

Bytes = NDArray[np.uint8]

BLOCK = 32  # weights that share a scale
ALIGNMENT = 32  # of every tensor in the file
CHUNK = 1 << 22  # weights quantised at once
TEXT, UINT32, INT32, FLOAT32, ARRAY = 8, 4, 5, 6, 9  # codes of metadata types
Value = str | int | float | list[str] | list[int] | list[float]

NAMES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def f16(values: Floats) -> Bytes:
    """IEEE half precision."""
    return values.astype(np.float16).reshape(-1).view(np.uint8)


def q8_0(values: Floats) -> Bytes:
    """Blocks of a half-precision scale and 32 signed bytes; halves round away from zero."""
    blocks = values.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _interleave(scales, rounded.view(np.uint8))


def q4_0(values: Floats) -> Bytes:
    """Blocks of a half-precision scale and 32 nibbles; the largest magnitude becomes -8."""
    blocks = values.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scales = largest / np.float32(-8)
    nibbles = np.minimum(blocks * _inverse(scales) + np.float32(8.5), 15).astype(np.uint8)
    return _interleave(scales, nibbles[:, : BLOCK // 2] | nibbles[:, BLOCK // 2 :] << 4)


class Kind(NamedTuple):
    """How a matrix is stored.

    Attributes:
        code: ggml's number of the type.
        file: `general.file_type` of a file that consists of it.
        block: weights of a block.
        size: bytes of a block.
        pack: float32 values -> their bytes.
    """

    code: int
    file: int
    block: int
    size: int
    pack: Callable[[Floats], Bytes]


F32 = Kind(0, 0, 1, 4, lambda values: values.reshape(-1).view(np.uint8))
KINDS = {
    "F16": Kind(1, 1, 1, 2, f16),
    "Q8_0": Kind(8, 7, BLOCK, 34, q8_0),
    "Q4_0": Kind(2, 2, BLOCK, 18, q4_0),
}


def write(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Floats],
    kind: str,
    tokenizer: Path | None = None,
) -> None:
    """Write a model of the Llama family.

    Args:
        path: where to.
        config: its shape.
        weights: canonical name -> float32 array; each is read once, in the mapping's order.
        kind: one of `KINDS`. A matrix whose rows are no whole number of blocks stays F16, as
            llama.cpp's own conversion does.
        tokenizer: a `tokenizer.json`, for servers; without one there are token numbers only.
    """
    if config.family != "llama" or not config.gated or config.norm != "rms":
        raise SystemExit(f"{config.family} cannot be written here: only the Llama family can")
    shapes = {name: _shape(config, name) for name in weights}
    kinds = {name: _kind(shape, kind) for name, shape in shapes.items()}
    sizes = {name: _bytes(shapes[name], kinds[name]) for name in weights}
    with path.open("wb") as file:
        metadata = _metadata(config, KINDS[kind].file)
        if tokenizer:
            metadata |= _tokenizer(tokenizer)
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(metadata)))
        file.writelines(_entry(key, value) for key, value in metadata.items())
        offset = 0
        for name, shape in shapes.items():
            file.write(_text(_tensor(name)))
            file.write(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            file.write(struct.pack("<IQ", kinds[name].code, offset))
            offset += _aligned(sizes[name])
        for name, shape in shapes.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            values = np.ascontiguousarray(weights[name], np.float32)
            if values.shape != shape:
                raise SystemExit(f"{name} is {list(values.shape)}, expected {list(shape)}")
            flat = _pairs_adjacent(config, name, values).reshape(-1)
            for start in range(0, flat.size, CHUNK):
                file.write(kinds[name].pack(flat[start : start + CHUNK]).data)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _metadata(config: ModelConfig, file_type: int) -> dict[str, Value]:
    layer = config.layers[0]
    if layer.rope is None or layer.rope.scaling != "default":
        raise SystemExit("rope scaling cannot be written here")
    return {
        "general.architecture": "llama",
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.context,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": len(config.layers),
        "llama.feed_forward_length": layer.intermediate,
        "llama.attention.head_count": layer.heads,
        "llama.attention.head_count_kv": layer.kv_heads,
        "llama.attention.key_length": layer.head_dim,
        "llama.attention.value_length": layer.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": layer.rope.dim,
        "llama.rope.freq_base": float(layer.rope.theta),
    }


def _tokenizer(path: Path) -> dict[str, Value]:
    """Llama's kind of vocabulary: pieces, of which those with the smaller numbers merge first."""
    found = json.loads(path.read_text())["model"]
    if found["type"] != "BPE" or not found.get("byte_fallback"):
        raise SystemExit(f"{path} is not of Llama's kind, with bytes for what has no piece")
    pieces = sorted(found["vocab"], key=found["vocab"].get)
    special = {"<unk>": 2, "<s>": 3, "</s>": 3}
    kinds = [special.get(each, 6 if each.startswith("<0x") else 1) for each in pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(number) for number in range(len(pieces))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": found["vocab"]["<s>"],
        "tokenizer.ggml.eos_token_id": found["vocab"]["</s>"],
        "tokenizer.ggml.unknown_token_id": found["vocab"]["<unk>"],
    }


def _shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Shape of a canonical weight, [out, in]."""
    layer, hidden, last = config.layers[0], config.hidden_size, name.rpartition(".")[2]
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (layer.intermediate, hidden),
        "up": (layer.intermediate, hidden),
        "down": (hidden, layer.intermediate),
        "embed": (config.vocab_size, hidden),
        "head": (config.vocab_size, hidden),
    }
    if last not in NAMES:
        raise SystemExit(f"{name} has no place in a GGUF file of the Llama family")
    return shapes.get(last, (hidden,))


def _tensor(name: str) -> str:
    """`layers.3.q` -> `blk.3.attn_q.weight`."""
    layer, _, last = name.rpartition(".")
    return f"{layer.replace('layers', 'blk')}{'.' if layer else ''}{NAMES[last]}.weight"


def _kind(shape: tuple[int, ...], kind: str) -> Kind:
    if len(shape) == 1:
        return F32
    return KINDS[kind if shape[-1] % KINDS[kind].block == 0 else "F16"]


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    return int(np.prod(shape)) // kind.block * kind.size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pairs_adjacent(config: ModelConfig, name: str, values: Floats) -> Floats:
    """llama.cpp rotates values 2i and 2i + 1 of a head together, we rotate i and i + half."""
    last = name.rpartition(".")[2]
    if last not in ("q", "k"):
        return values
    dim = config.layers[0].head_dim
    halves = values.reshape(-1, 2, dim // 2, values.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _inverse(scales: Floats) -> Floats:
    """1 / scale, and 0 for a block of zeros."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _interleave(scales: Floats, codes: Bytes) -> Bytes:
    """Each block's scale [blocks, 1], then its codes [blocks, bytes]."""
    return np.hstack([scales.astype(np.float16).view(np.uint8), codes]).reshape(-1)


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _entry(key: str, value: Value) -> bytes:
    if isinstance(value, list):
        code, _ = _typed(value[0], INT32)
        content = b"".join(_typed(each, INT32)[1] for each in value)
        return _text(key) + struct.pack("<IIQ", ARRAY, code, len(value)) + content
    code, content = _typed(value, UINT32)
    return _text(key) + struct.pack("<I", code) + content


def _typed(value: str | int | float, whole: int) -> tuple[int, bytes]:
    """Return a value's type and bytes; `whole` is the type of integers."""
    if isinstance(value, str):
        return TEXT, _text(value)
    if isinstance(value, int):
        return whole, struct.pack("<i", value)
    return FLOAT32, struct.pack("<f", value)

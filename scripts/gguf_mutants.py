"""GGUF files to start from, and changed copies of them: the material of `fuzz_gguf.py`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paceline.models.formats.gguf import GGUFFile, GGUFTensor
from paceline.models.formats.gguf_types import TYPES
from paceline.models.gguf_architectures import ARCHITECTURES
from paceline.models.gguf_config import read_gguf_config
from paceline.models.tensor_names import places

VOCAB, TOKENS = 96, 300  # of small models, of shortened ones
NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 255, 256, 1000, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1),
)


@dataclass(frozen=True)
class Seed:
    """A valid file.

    Attributes:
        name: for reports.
        data: its bytes.
        fields: (offset, bytes) of its numbers.
        pieces: (start, end) of keys and tensors.
    """

    name: str
    data: bytes
    fields: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, int], ...]


class Writer:
    """Writes a file and notes where its numbers are."""

    def __init__(self) -> None:
        self.data = bytearray(b"GGUF")
        self.fields: list[tuple[int, int]] = []
        self.pieces: list[tuple[int, int]] = []

    def number(self, value: float, form: str) -> None:
        """Add a number."""
        self.fields.append((len(self.data), struct.calcsize(form)))
        self.data += struct.pack(form, value)

    def text(self, value: bytes) -> None:
        """Add a string."""
        self.number(len(value), "<Q")
        self.data += value

    def value(self, value: Any) -> None:
        """Add a value with its type."""
        if isinstance(value, bool):
            self.number(7, "<I")
            self.number(value, "<B")
        elif isinstance(value, int):
            self.number(4, "<I")
            self.number(value, "<I")
        elif isinstance(value, float):
            self.number(6, "<I")
            self.number(value, "<f")
        elif isinstance(value, str):
            self.number(8, "<I")
            self.text(value.encode())
        else:
            self.array(value)

    def array(self, values: Any) -> None:
        """Add an array."""
        strings = isinstance(values, list)
        kinds = {"f": (6, "<f4"), "i": (5, "<i4"), "u": (4, "<u4"), "b": (7, "u1")}
        kind, dtype = (8, "") if strings else kinds[values.dtype.kind]
        self.number(9, "<I")
        self.number(kind, "<I")
        self.number(len(values), "<Q")
        if strings:
            for value in values:
                self.text(value)
        else:
            self.data += values.astype(dtype).tobytes()

    def seed(self, name: str, metadata: dict[str, Any], tensors: Sequence[GGUFTensor]) -> Seed:
        """Write the file."""
        self.number(3, "<I")
        self.number(len(tensors), "<Q")
        self.number(len(metadata), "<Q")
        for key, value in metadata.items():
            start = len(self.data)
            self.text(key.encode())
            self.value(value)
            self.pieces.append((start, len(self.data)))
        offset = 0
        for tensor in tensors:
            start = len(self.data)
            self.text(tensor.name.encode())
            self.number(len(tensor.shape), "<I")
            for size in reversed(tensor.shape):
                self.number(size, "<Q")
            self.number(TYPES[tensor.type].id, "<I")
            self.number(offset, "<Q")
            offset += -(-tensor.data.size // 32) * 32
            self.pieces.append((start, len(self.data)))
        self.data += bytes(-len(self.data) % 32)
        for tensor in tensors:
            self.data += tensor.data.tobytes() + bytes(-tensor.data.size % 32)
        return Seed(name, bytes(self.data), tuple(self.fields), tuple(self.pieces))


def random_tensor(
    random: np.random.Generator, name: str, shape: tuple[int, ...], kind: str
) -> GGUFTensor:
    """A tensor of small finite values."""
    rows, row = int(np.prod(shape[:-1])), TYPES[kind].row_bytes(shape[-1])
    if kind in ("F32", "F16", "BF16"):
        values = random.normal(0, 0.05, (rows, shape[-1])).astype(np.float32)
        stored = values.astype(np.float16) if kind == "F16" else values
        data = stored.view(np.uint8)
        if kind == "BF16":
            data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return GGUFTensor(name, kind, shape, data.reshape(rows, row))
    blocks = random.integers(0, 256, (rows * row // TYPES[kind].nbytes, TYPES[kind].nbytes))
    blocks = blocks.astype(np.uint8)
    for at in TYPES[kind].halves:
        blocks[:, at : at + 2] = np.float16([2e-4]).view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = 115
    return GGUFTensor(name, kind, shape, blocks.reshape(rows, row))


def vocabulary(random: np.random.Generator) -> dict[str, Any]:
    """Metadata of one of the two kinds of tokenizers."""
    letters = [bytes([each]) for each in range(65, 65 + 40)]
    if random.random() < 0.5:
        merged = [a + b for a, b in pairwise(letters)]
        merges = [a + b" " + b for a, b in pairwise(letters)]
        tokens = [*letters, *merged, b"<|im_end|>"]
        own: dict[str, Any] = {"model": "gpt2", "pre": "llama-bpe", "merges": merges}
    else:
        pieces = [b"<unk>", b"<s>", b"</s>", *letters, b"AB", b"ABC", b"\xe2\x96\x81A"]
        tokens = pieces
        own = {"model": "llama", "scores": -np.arange(len(tokens), dtype=np.float32)}
    tokens = tokens[:VOCAB]
    own |= {"tokens": tokens, "token_type": np.ones(len(tokens), np.int32)}
    own |= {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True}
    named = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    return named | {"tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}


def small(name: str, kind: str, random: np.random.Generator) -> Seed:
    """A small model of an architecture, most of its matrices in one type."""
    wide = TYPES[kind].weights == 256
    hidden, head = (256, 64) if wide else (64, 16)
    own = {
        **{"context_length": 64, "embedding_length": hidden, "block_count": 1 if wide else 2},
        **{"feed_forward_length": hidden, "attention.head_count": 4, "rope.freq_base": 1e4},
        **{"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5},
        **{"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": head},
    }
    if name == "gpt2":
        own["attention.head_count_kv"] = 4
    if "attention.sliding_window" in ARCHITECTURES[name].keys:
        own["attention.sliding_window"] = 16
    if name == "phi3":
        own["rope.scaling.original_context_length"] = 32
    if name == "mistral3":
        own |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
        own |= {"rope.scaling.original_context_length": 32, "attention.temperature_scale": 0.1}
    metadata = {"general.architecture": name, "general.alignment": 32}
    metadata |= {f"{name}.{key}": value for key, value in own.items()} | vocabulary(random)
    held: dict[str, GGUFTensor] = {}

    def add(tensor: str, shape: tuple[int, ...], stored: str) -> GGUFTensor:
        held[tensor] = random_tensor(random, tensor, shape, stored)
        return held[tensor]

    add("token_embd.weight", (VOCAB, hidden), kind)
    if name == "phi2":
        add("output.weight", (VOCAB, hidden), kind)
    if name == "llama":
        add("rope_freqs.weight", (head // 2,), "F32").data.view(np.float32)[:] = 1.5
    if name == "phi3":
        for factors in ("rope_factors_short.weight", "rope_factors_long.weight"):
            add(factors, (head // 2,), "F32").data.view(np.float32)[:] = 1.25
    file = GGUFFile(Path(name), metadata, held, ())
    config, family, _ = read_gguf_config(file)
    biased = frozenset("qkvo" if random.random() < 0.3 else "")
    for place in places(config, family, biased).values():
        if place.tensor in held or (place.tensor.startswith("output.") and random.random() < 0.5):
            continue
        vector = len(place.stored) == 1 or "position" in place.tensor
        each = "F32" if vector else str(random.choice([kind, kind, "Q8_0"]))
        add(place.tensor, place.stored, each)
    return Writer().seed(f"{name} {kind}", metadata, list(held.values()))


def shortened(path: Path, random: np.random.Generator) -> Seed:
    """The metadata of a real file and two of its layers, with fewer tokens and narrower."""
    file = GGUFFile.open(path)
    metadata = dict(file.metadata)
    for key, value in metadata.items():
        if key.startswith("tokenizer.") and isinstance(value, list | np.ndarray):
            metadata[key] = value[:TOKENS]
    known = set(metadata["tokenizer.ggml.tokens"])
    if merges := file.metadata.get("tokenizer.ggml.merges"):
        parts = ((merge, *merge.split(b" ", 1)) for merge in merges[:TOKENS])
        kept = [merge for merge, a, b in parts if {a, b, a + b} <= known]
        metadata["tokenizer.ggml.merges"] = kept
    name = metadata["general.architecture"]
    metadata[f"{name}.block_count"] = 2
    metadata.pop(f"{name}.vocab_size", None)
    metadata |= {key: 1 for key in metadata if key.endswith("_token_id")}
    sizes = {f"{name}.{key}": 256 for key in ("embedding_length", "feed_forward_length")}
    sizes |= {f"{name}.attention.head_count": 4, f"{name}.attention.head_count_kv": 2}
    sizes |= {f"{name}.attention.key_length": 64, f"{name}.attention.value_length": 64}
    metadata |= {key: value for key, value in sizes.items() if key in metadata}
    metadata[f"{name}.context_length"] = 128
    if f"{name}.rope.dimension_count" in metadata:
        metadata[f"{name}.rope.dimension_count"] = 64
    old = file.tensors["token_embd.weight"]
    held = {old.name: random_tensor(random, old.name, (TOKENS, 256), old.type)}
    config, family, _ = read_gguf_config(GGUFFile(path, metadata, held, ()))
    biased = frozenset("qkv" if "blk.0.attn_q.bias" in file.tensors else "")
    for place in places(config, family, biased).values():
        if place.tensor not in held and place.tensor in file.tensors:
            kind = file.tensors[place.tensor].type
            held[place.tensor] = random_tensor(random, place.tensor, place.stored, kind)
    return Writer().seed(path.name, metadata, list(held.values()))


def seeds(files: Sequence[Path]) -> list[Seed]:
    """All seeds, the same in every process."""
    random = np.random.default_rng(0)
    kinds = list(TYPES)
    made = [
        small(name, kinds[(index + shift) % len(kinds)], random)
        for index, name in enumerate(ARCHITECTURES)
        for shift in (0, 9)
    ]
    return made + [shortened(path, random) for path in files]


def mutate(random: np.random.Generator, seed: Seed, others: Sequence[Seed]) -> bytes:
    """A changed copy, by one to three changes."""
    data = bytearray(seed.data)
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        change = CHANGES[random.choice(len(CHANGES), p=SHARES)]
        data = change(random, data, seed, others)
    return bytes(data)


def change_number(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Put an odd number, or one near the right one, into a count, a length, a type or a size."""
    at, size = seed.fields[random.integers(len(seed.fields))]
    if at + size <= len(data):
        value = NUMBERS[random.integers(len(NUMBERS))]
        if random.random() < 0.4:
            old = int.from_bytes(data[at : at + size], "little")
            value = old + int(random.integers(-2, 3))
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return data


def change_bytes(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Put random bytes into the header."""
    end = min(len(data), seed.pieces[-1][1] + 64)
    for at in random.integers(0, max(end, 1), int(random.integers(1, 9))).tolist():
        if at < len(data):
            data[at] = int(random.integers(256))
    return data


def change_data(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Random bytes among the weights: infinite scales and the like."""
    start = seed.pieces[-1][1]
    if start < len(data):
        for at in random.integers(start, len(data), 64).tolist():
            data[at] = int(random.choice([0, 0x7C, 0x7F, 0xFF, int(random.integers(256))]))
    return data


def truncate(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Cut the file."""
    end = len(data) if random.random() < 0.3 else min(len(data), seed.pieces[-1][1] + 64)
    return data[: int(random.integers(0, end + 1))]


def repeat_piece(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Put a key or a tensor in the place of another, or remove it; the counts may follow."""
    here = seed.pieces[random.integers(len(seed.pieces))]
    other = others[random.integers(len(others))] if random.random() < 0.5 else seed
    start, end = other.pieces[random.integers(len(other.pieces))]
    piece = b"" if random.random() < 0.3 else other.data[start:end]
    drop = random.random() < 0.7
    data[here[0] : here[1] if drop else here[0]] = piece
    if len(data) >= 24 and drop != bool(piece) and random.random() < 0.8:
        at = 16 if here[1] <= key_end(seed) else 8
        value = int.from_bytes(data[at : at + 8], "little") + (1 if piece else -1)
        data[at : at + 8] = (value % (1 << 64)).to_bytes(8, "little")
    return data


def key_end(seed: Seed) -> int:
    """Where the keys end."""
    keys = int.from_bytes(seed.data[16:24], "little")
    return seed.pieces[keys - 1][1]


def splice(
    random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]
) -> bytearray:
    """Insert some bytes of another file."""
    other = others[random.integers(len(others))].data
    start, at = random.integers(0, len(other)), random.integers(0, len(data) + 1)
    data[at:at] = other[start : start + int(random.integers(1, 200))]
    return data


CHANGES = (change_number, change_bytes, change_data, truncate, repeat_piece, splice)
SHARES = (0.42, 0.13, 0.2, 0.05, 0.15, 0.05)


def mutant(seed: int, which: int, made: Sequence[Seed]) -> bytes:
    """The mutant of a number."""
    random = np.random.default_rng([seed, which])
    return mutate(random, made[random.integers(len(made))], made)

"""GGUF's block types run in their own bits: the file's values, the same sums for any pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines.formats import BITS, FORMATS, GGUF_FORMATS, HEADS, parse_format
from paceline.engines.native import NativeEngine
from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.formats.gguf_types import TYPES
from paceline.models.rope import Rope
from paceline.models.tensors import BlockQuantized, Linear
from tests.engines.test_native import ISAS, check_every_bit, run

NAMES = tuple(name.upper() for name in GGUF_FORMATS)
SMALL = tuple(name for name in NAMES if TYPES[name].weights == 32)
VOCAB = tiny.VOCAB + 3  # rows of the head, no multiple of sixteen
HALF_MAX = np.float16(65504)


def blocks(random, name: str, rows: int, inputs: int, halves=None) -> BlockQuantized:
    """Random codes; scales and minima from `halves(shape)`, usual ones by default."""
    kind = TYPES[name]
    data = random.integers(0, 256, (rows, inputs // kind.weights, kind.nbytes)).astype(np.uint8)
    size = 0.3 / kind.values(np.full((1, kind.nbytes), 0x3B, np.uint8)).std().clip(0.5)
    for at in kind.halves:
        shape = data.shape[:2]
        drawn = halves(shape) if halves else random.standard_normal(shape) * size
        data[..., at : at + 2] = drawn.astype("<f2")[..., None].view(np.uint8)
    if name == "MXFP4":
        data[..., 0] = random.integers(120, 126, data.shape[:2])
    return BlockQuantized(name, data.reshape(rows, -1), inputs)


def extreme_halves(random):
    """Zero, the smallest and the largest numbers of either sign among usual ones."""
    edges = [0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, HALF_MAX, -HALF_MAX]

    def draw(shape):
        usual = random.standard_normal(shape)
        return np.where(random.random(shape) < 0.5, random.choice(edges, shape), usual)

    return draw


def config(hidden: int, intermediate: int, gated: bool = True) -> ModelConfig:
    layer = LayerConfig(8, 2, 32, intermediate, None, Rope(1e4, 32))
    return ModelConfig(
        "test", VOCAB, hidden, 96, (layer, layer), "rms", 1e-5, "silu", gated, 0.0, True
    )


def weights_of(shape: ModelConfig, name_of, seed: int = 0) -> dict[str, object]:
    """All matrices in blocks, each of the type `name_of` says."""
    random = np.random.default_rng(seed)
    hidden, layer = shape.hidden_size, shape.layers[0]
    query, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    sizes = {"q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query)}
    sizes |= {"up": (layer.intermediate, hidden), "down": (hidden, layer.intermediate)}
    if shape.gated:
        sizes["gate"] = sizes["up"]
    weights: dict[str, object] = {"final_norm": np.ones(hidden, np.float32)}
    weights["embed"] = blocks(random, name_of("embed"), VOCAB, hidden)
    for i in range(len(shape.layers)):
        for norm in ("attn_norm", "mlp_norm"):
            weights[f"layers.{i}.{norm}"] = np.ones(hidden, np.float32)
        for part, size in sizes.items():
            weights[f"layers.{i}.{part}"] = blocks(random, name_of(part), *size)
    return weights


def load_blocks(model, weights, *_) -> str:
    matrices = {name: each for name, each in weights.items() if isinstance(each, Linear)}
    for name, matrix in matrices.items():
        model.set_format(name, matrix.format)
    for name, weight in weights.items():
        if name in matrices:
            model.load_blocks(name, weight.data, weight.inputs)
        else:
            model.set(name, weight)
    return "blocks"


def open_blocks(shape: ModelConfig, weights: dict[str, object], **options) -> NativeEngine:
    with mock.patch("paceline.engines.native.load_weights", load_blocks):
        engine = NativeEngine(shape, weights, **options)
    engine._model.worth_waking = 0  # share even the smallest pass
    return engine


def check_products(
    engine: NativeEngine, values: np.ndarray, sizes: Iterable[int], sums: float | None = None
) -> None:
    """Compare the logits of chains of these sizes with exact products by `values`.

    They may differ by the rounding of activations to int16, and by that of `sums` in fp32; by
    default of 20 for each 16 columns: codes less a zero point, or with a minimum, are sums of
    larger numbers than the weights.
    """
    values = values.astype(np.float64)
    sums = sums or values.shape[1] / 16 * 20
    for n in sizes:
        tree = TokenTree.chain(np.arange(n, dtype=np.int32) % VOCAB)
        logits = engine.forward([(engine.open(), tree)])
        states = engine.hidden().astype(np.float64)
        largest = (np.abs(states) @ np.abs(values).T).max(1, keepdims=True)
        step = np.abs(states).max(1, keepdims=True) / 32767
        rounded = step / 2 * np.abs(values).sum(1)
        added = 2.0**-24 * sums * largest
        assert (np.abs(logits - states @ values.T) <= rounded + added).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_that_of_the_file(name: str, isa: str) -> None:
    random = np.random.default_rng(0)
    shape = config(1280 if name not in SMALL else 1184, 256)
    model = _native.NativeModel(shape, "fp32", "fp32", "fp32", isa, 2)
    matrix = blocks(random, name, VOCAB, shape.hidden_size, extreme_halves(random))
    if name == "MXFP4":
        matrix.data.reshape(VOCAB, -1, 17)[..., 0] = random.integers(0, 253, (VOCAB, 37))
    model.set_format("embed", matrix.format)
    model.load_blocks("embed", matrix.data, matrix.inputs)
    found, expected = model.get("embed"), matrix.dense()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_a_panel_takes_no_more_bytes_than_the_rows_of_a_file(name: str) -> None:
    assert BITS[name.lower()] == TYPES[name].bits
    assert name.lower() not in FORMATS + HEADS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_products_differ_from_exact_ones_by_rounding(name: str, isa: str) -> None:
    """By that of activations to int16, and of as many fp32 sums as a row has blocks."""
    shape = config(768 if name not in SMALL else 736, 256)
    weights = weights_of(shape, lambda _: name if name in SMALL else "Q8_0")
    weights["embed"] = blocks(np.random.default_rng(5), name, VOCAB, shape.hidden_size)
    engine = open_blocks(shape, weights, isa=isa, threads=2)
    check_products(engine, weights["embed"].dense(), (*range(1, 27), 40, 61))


@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_differ_by_rounding(name: str) -> None:
    shape = config(256, 256)
    weights = weights_of(shape, lambda _: name)
    ids = np.arange(30, dtype=np.int32)
    first, *others = (run(open_blocks(shape, weights, isa=isa), ids, 30) for isa in ISAS)
    for other in others:
        np.testing.assert_allclose(other, first, atol=2e-3 * np.abs(first).max(), rtol=0)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Whatever the types, the tree, the chunks, the threads and the instruction set."""
    name = data.draw(st.sampled_from(NAMES))
    shape = config(256, 256, data.draw(st.booleans()))
    if name in SMALL:
        shape = config(data.draw(st.sampled_from((32, 288, 320))), 96, shape.gated)
    mixed = data.draw(st.booleans())
    types = SMALL if name in SMALL else NAMES
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    weights = weights_of(shape, lambda _: types[random.integers(len(types))] if mixed else name)
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_blocks(shape, weights, isa=isa, threads=threads)
    check_every_bit(engine, random, data)


def test_rows_of_another_size_and_scales_that_are_not_finite_are_refused() -> None:
    random, shape = np.random.default_rng(0), config(256, 256)
    model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
    matrix = blocks(random, "Q4_K", VOCAB, 256)
    with pytest.raises(ValueError, match="cannot be kept as it is in fp32"):
        model.load_blocks("embed", matrix.data, 256)
    model.set_format("embed", "q4_k")
    for rows, inputs, message in (
        (matrix.data[:-1], 256, rf"shape \[{VOCAB - 1}, 256\], expected \[{VOCAB}, 256\]"),
        (matrix.data, 512, rf"shape \[{VOCAB}, 512\], expected \[{VOCAB}, 256\]"),
        (matrix.data[:, :-1], 256, "143 bytes a row, expected 144 for 256 inputs in q4_k"),
        (np.tile(matrix.data, 2), 256, "288 bytes a row, expected 144"),
        (matrix.data[:, :0], 256, "0 bytes a row"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_blocks("embed", np.ascontiguousarray(rows), inputs)
    for name in NAMES:
        for at in TYPES[name].halves or (0,):
            model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
            model.set_format("embed", name.lower())
            bad = blocks(random, name, VOCAB, 256).data
            bad[37, at : at + 2] = (253, 0) if name == "MXFP4" else (0, 0x7C)
            with pytest.raises(ValueError, match="holds NaN or infinite values"):
                model.load_blocks("embed", bad, 256)
    with pytest.raises(ValueError, match="no matrix of this model"):
        model.load_blocks("layers.0.nothing", matrix.data, 256)
    shape = replace(shape, hidden_size=288)
    model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
    model.set_format("embed", "q4_k")
    with pytest.raises(ValueError, match="162 bytes a row, expected 0 for 288 inputs"):
        model.load_blocks("embed", np.zeros((VOCAB, 162), np.uint8), 288)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_no_floats_are_rounded_to_a_type_of_files(name: str) -> None:
    for text in (name, f"int4:head={name}"):
        with pytest.raises(MethodError, match="holds only weights that a GGUF file stores so"):
            parse_format(text)
    shape = config(256, 256)
    weights = weights_of(shape, lambda _: "Q8_0")
    model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
    model.set_format("embed", name)
    with pytest.raises(ValueError, match=f"cannot be rounded to {name}: only weights of a file"):
        model.set("embed", weights["embed"].dense())

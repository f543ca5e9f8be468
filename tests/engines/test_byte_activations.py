"""Activations of 8 bits: rounded as a slow reference does, the same bits for any pass."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.engines import byte_activations, open_engine
from paceline.engines.byte_activations import KINDS
from paceline.engines.native import NativeEngine
from paceline.errors import MethodError
from tests.engines.test_block_formats import (
    NAMES,
    SMALL,
    VOCAB,
    blocks,
    config,
    extreme_halves,
    open_blocks,
    weights_of,
)
from tests.engines.test_native import ISAS, check_every_bit, run, tiny_model

MORE_BITS = 2.0  # times its share of a row's error, above which a block has 16 bits
__all__ = ["tiny_model"]  # a fixture


def rounded_blocks(values: np.ndarray) -> np.ndarray:
    """Activations [N, K] as the products see them, in float64."""
    n, inputs = values.shape
    whole = np.zeros((n, -(-inputs // 32) * 32), np.float32)
    whole[:, :inputs] = values
    split = whole.reshape(n, -1, 32)
    sizes = np.abs(split).max(-1)
    squares = np.add.accumulate(sizes * sizes, 1, np.float32)[:, -1]
    limits = np.sqrt(np.float32(MORE_BITS) * squares / np.float32(split.shape[1]))
    used = sizes > 1e-30
    scales = np.where(used, sizes / np.float32(127), 0).astype(np.float32)[..., None]
    inverse = (np.float32(127) / np.where(used, sizes, np.inf)).astype(np.float32)[..., None]
    codes = np.rint(np.clip(split * inverse, -127, 127))
    result = codes.astype(np.float64) * scales
    missing = split - codes * scales
    finer = np.rint(np.clip(missing * (inverse * np.float32(254)), -127, 127))
    more = (sizes > limits[:, None])[..., None]
    result += np.where(more, finer.astype(np.float64) * (scales / np.float32(254)), 0)
    return result.reshape(n, -1)[:, :inputs]


def in_bytes(engine: NativeEngine, kinds: list[str] | None = None) -> NativeEngine:
    engine._model.set_byte_activations(KINDS if kinds is None else kinds)
    return engine


def outliers(random, size: int) -> np.ndarray:
    """Weights of a norm with some inputs much larger than others, and blocks of zeros."""
    weights = random.uniform(0.5, 1.5, size).astype(np.float32)
    weights[random.integers(0, size, 3)] *= np.float32(60)
    weights[random.integers(0, size)] *= np.float32(400)
    start = int(random.integers(0, size // 32)) * 32
    weights[start : start + 32] = 0
    return weights


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_activations_rounded_in_blocks(name: str, isa: str) -> None:
    random = np.random.default_rng(3)
    shape = config(768 if name not in SMALL else 736, 256)
    weights = weights_of(shape, lambda _: name if name in SMALL else "Q8_0")
    weights["embed"] = blocks(random, name, VOCAB, shape.hidden_size)
    weights["final_norm"] = outliers(random, shape.hidden_size)
    engine = in_bytes(open_blocks(shape, weights, isa=isa, threads=2), ["head"])
    check_head(engine, weights["embed"].dense())


def check_head(engine: NativeEngine, values: np.ndarray) -> None:
    """Compare logits with exact products of the rounded states, up to that of fp32 sums."""
    values = values.astype(np.float64)
    for n in (*range(1, 19), 31, 32, 33, 50):
        tree = TokenTree.chain(np.arange(n, dtype=np.int32) % len(values))
        logits = engine.forward([(engine.open(), tree)])
        states = rounded_blocks(engine.hidden())
        expected, sizes = states @ values.T, np.abs(states) @ np.abs(values).T
        added = 2.0**-24 * states.shape[1] / 16 * 20 * sizes.max(1, keepdims=True)
        assert (np.abs(logits - expected) <= added).all()


@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_agree_in_every_bit_where_sums_are_fused(name: str) -> None:
    ids = np.arange(40, dtype=np.int32) % 30
    shape = config(256, 256)
    weights = weights_of(shape, lambda _: name)
    engines = [in_bytes(open_blocks(shape, weights, isa=isa)) for isa in ISAS]
    logits = {engine.isa: run(engine, ids, 40) for engine in engines}
    plain = logits.pop("portable")
    for found in logits.values():
        np.testing.assert_array_equal(found, next(iter(logits.values())))
        # A sum that rounds otherwise may turn a number of 8 bits over.
        assert np.median(np.abs(found - plain)) <= 2e-2 * np.abs(plain).max()


@settings(max_examples=80, deadline=None)
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
    for norm in (key for key in weights if key.endswith("norm")):
        if random.integers(2):
            weights[norm] = outliers(random, shape.hidden_size)
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_blocks(shape, weights, isa=isa, threads=threads)
    in_bytes(engine, data.draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True)))
    check_every_bit(engine, random, data)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q6_K"])
def test_values_that_are_no_numbers_stay_so_and_tiny_ones_are_zero(name: str, isa: str) -> None:
    shape = config(256, 256)
    for size, expected in ((3e38, np.isnan), (1e-38, lambda logits: logits == 0)):
        weights = weights_of(shape, lambda _: name)
        weights["final_norm"] = np.full(256, size, np.float32)
        engine = in_bytes(open_blocks(shape, weights, isa=isa), ["head"])
        tree = TokenTree.chain(np.arange(5, dtype=np.int32))
        assert expected(engine.forward([(engine.open(), tree)])).all()


def test_extreme_scales_of_a_file_keep_to_the_rounded_products() -> None:
    random, shape = np.random.default_rng(2), config(256, 256)
    for name in ("Q4_0", "Q5_1", "Q4_K"):
        weights = weights_of(shape, lambda _: "Q8_0")
        weights["embed"] = blocks(random, name, VOCAB, 256, extreme_halves(random))
        engine = in_bytes(open_blocks(shape, weights), ["head"])
        logits = run(engine, np.arange(8, dtype=np.int32), 8)
        assert np.isfinite(logits).all()


def test_a_format_names_its_activations(tiny_model) -> None:
    shape = config(256, 256)
    weights = weights_of(shape, lambda _: "Q8_0")
    for text, found in (
        ("auto:act=int8", ("blocks:act=int8", "int8")),
        ("auto,act=int8", ("blocks:act=int8", "int8")),
        ("auto:act=int16", ("blocks", "int16")),
        ("auto", ("blocks", "int16")),
    ):
        engine = open_blocks(shape, weights, format=text)
        assert (engine.format, engine.activations) == found
    model = tiny_model("llama-gqa-tied-bias")
    for text in ("fp32:act=auto", "int4:head=fp16,act=int16"):
        assert "act" not in open_engine(model, weight_format=text).format
    for text, found in (
        ("int8,act=int8", "int8:act=int8"),
        ("int4:act=int8,head=bf16", "int4:head=bf16,act=int8"),
    ):
        assert open_engine(model, weight_format=text).format == found
    for text in ("fp32:act=int8", "auto:act=int8", "bf16,act=int8", "int8_fp16:act=int8"):
        with pytest.raises(MethodError, match="needs weights in GGUF blocks or in groups"):
            open_engine(model, weight_format=text)
    with pytest.raises(MethodError, match="unknown format of activations 'int9'"):
        open_engine(model, weight_format="auto:act=int9")


def test_auto_takes_them_where_the_logits_lose_little() -> None:
    shape = config(256, 256)
    weights = weights_of(shape, lambda _: "Q4_K")
    for bound, expected in ((1.0, "int8"), (0.0, "int16")):
        with mock.patch.object(byte_activations, "BOUND", bound):
            engine = open_blocks(shape, weights, format="auto:act=auto")
        assert engine.activations == expected
        fixed = open_blocks(shape, weights, format=f"auto:act={expected}")
        ids = np.arange(30, dtype=np.int32)
        np.testing.assert_array_equal(run(engine, ids, 30), run(fixed, ids, 30))
        assert engine.memory.used == 0

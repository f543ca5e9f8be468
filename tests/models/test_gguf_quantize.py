"""Quantisers of GGUF types: the `gguf` package's bits, and no larger errors than llama.cpp's."""

from __future__ import annotations

import ctypes
from functools import cache

import gguf
import numpy as np
import pytest
from benchmarks.llama_cpp import Library
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from paceline.errors import ModelError
from paceline.models.formats.gguf_quantize import WRITABLE, quantize
from paceline.models.formats.gguf_types import TYPES, dequantize

EXACT = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0")
SEARCHED = tuple(name for name in WRITABLE if name not in EXACT)
WEIGHTED = (*SEARCHED, "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@cache
def llama_cpp():
    c = Library().c
    c.ggml_quantize_chunk.restype = ctypes.c_size_t
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    c.ggml_quantize_chunk.argtypes = (number, pointer, pointer, size, size, size, pointer)
    return c


def theirs(name, values, importance=None):
    """Values after llama.cpp's own quantiser."""
    rows, inputs = values.shape
    out = np.zeros((rows, TYPES[name].row_bytes(inputs)), np.uint8)
    own = None if importance is None else importance.ctypes.data
    kind = TYPES[name].id
    llama_cpp().ggml_quantize_init(kind)
    source = np.ascontiguousarray(values)
    written = llama_cpp().ggml_quantize_chunk(
        kind, source.ctypes.data, out.ctypes.data, 0, rows, inputs, own
    )
    assert written == out.nbytes
    return dequantize(name, out)


def ours(name, values, importance=None):
    return dequantize(name, quantize(name, values, importance))


def samples(kind, rows=24, inputs=1024):
    random = np.random.default_rng(3)
    drawn = {
        "normal": lambda: random.standard_normal((rows, inputs)),
        "heavy tails": lambda: random.standard_t(3, (rows, inputs)),
        "shifted": lambda: random.uniform(-0.2, 1, (rows, inputs)),
        "coarse": lambda: random.integers(-3, 4, (rows, inputs)) * random.uniform(1, 2, (rows, 1)),
    }[kind]()
    return (0.02 * drawn).astype(np.float32)


def error(values, kept, weights=1.0):
    return float((weights * (kept - values) ** 2).mean())


def floats(width):
    return arrays(np.float32, st.tuples(st.integers(1, 3), st.just(width)), elements=width_floats())


def width_floats():
    usual = st.floats(-100, 100, width=32)
    return st.one_of(usual, st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0]))


@pytest.mark.parametrize("name", EXACT)
@given(floats(512))
def test_the_bits_are_those_of_the_package(name, values):
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
        peaks = np.abs(values.reshape(-1, TYPES[name].weights))
    if peaks[peaks > 0].min(initial=1) < 1e-30:  # there the package divides by zero
        return
    np.testing.assert_array_equal(quantize(name, values), expected.reshape(len(values), -1))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted", "coarse"])
def test_usual_matrices_have_the_bits_of_the_package(name, kind):
    values = samples(kind)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(quantize(name, values), expected.reshape(len(values), -1))


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted"])
def test_the_error_is_no_larger_than_llama_cpps(name, kind):
    values = samples(kind)
    blocks = values.reshape(-1, TYPES[name].weights)
    weights = (np.sqrt((blocks**2).mean(1, keepdims=True)) + abs(blocks)).reshape(values.shape)
    own, other = ours(name, values), theirs(name, values)
    assert error(values, own) <= error(values, other)
    assert error(values, own, weights) <= error(values, other, weights)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "shifted"])
def test_with_importance_the_weighted_error_is_no_larger_than_llama_cpps(name, kind):
    values = samples(kind)
    random = np.random.default_rng(5)
    importance = random.gamma(0.5, 1, values.shape[1]).astype(np.float32)
    own, other = ours(name, values, importance), theirs(name, values, importance)
    assert error(values, own, importance) <= error(values, other, importance)
    assert error(values, own, importance) < error(values, ours(name, values), importance)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_values_of_the_type_itself_are_found_again(name):
    values = ours(name, samples("normal"))
    again = ours(name, values)
    assert error(values, again) < 1e-5 * float((values**2).mean())


@pytest.mark.parametrize("name", WRITABLE)
@given(st.sampled_from([0.0, -0.0, 1e-42, -1e-40, 1e-12, 0.37, -2.5, 30.0]))
def test_constant_blocks_stay_nearly_constant(name, value):
    values = np.full((2, 512), value, np.float32)
    kept = ours(name, values)
    assert np.isfinite(kept).all()
    assert abs(kept - value).max() <= abs(value) / 25 + 1e-7


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=30)
@given(
    arrays(
        np.float32,
        (2, 256),
        elements=st.one_of(
            st.floats(-(2.0**127), 2.0**127, width=32),
            st.floats(-(2.0**-126), 2.0**-126, width=32),
            st.just(0.0),
        ),
    )
)
def test_any_finite_values_are_kept_roughly_or_refused(name, values):
    try:
        kept = ours(name, values)
    except ModelError:
        assert np.abs(values).max() > 6e4
        return
    assert np.isfinite(kept).all()
    peaks = np.abs(values).reshape(-1, TYPES[name].weights).max(1)
    errors = np.abs(kept - values).reshape(-1, TYPES[name].weights).max(1)
    assert (errors <= 0.6 * peaks + 1e-5).all()


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(name, bad):
    values = samples("normal", 2, 256)
    values[1, 17] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize(name, values)


@pytest.mark.parametrize("name", [name for name in WRITABLE if name not in ("F32", "BF16")])
@pytest.mark.parametrize("value", [1e9, -1e9, 1e13, -1e38])
def test_what_half_precision_cannot_hold_is_refused(name, value):
    values = samples("normal", 2, 256)
    values[1, 17] = value
    with pytest.raises(ModelError, match=rf"up to 1e\+.* are more than {name} can hold"):
        quantize(name, values)


@pytest.mark.parametrize("name", [name for name in WRITABLE if name not in ("F32", "BF16")])
@settings(max_examples=20)
@given(st.floats(2, 30), st.sampled_from([-1, 1]))
def test_large_values_are_refused_rather_than_lost(name, power, sign):
    values = samples("normal", 1, 256)
    values[0, 17] = sign * 10.0**power
    try:
        kept = ours(name, values)
    except ModelError:
        assert power > 4.8
        return
    assert abs(kept[0, 17] / values[0, 17] - 1) < 0.2


def test_what_bfloat16_would_round_to_infinity_is_refused():
    largest = np.full((1, 1), np.finfo(np.float32).max, np.float32)
    assert np.array_equal(ours("F32", largest), largest)
    with pytest.raises(ModelError, match="more than BF16"):
        quantize("BF16", largest)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ModelError, match=r"rows of 320 inputs cannot be stored as Q4_K"):
        quantize("Q4_K", np.zeros((1, 320), np.float32))


def test_an_unknown_type_is_refused():
    with pytest.raises(ModelError, match="unknown GGUF type 'IQ2_XS'"):
        quantize("IQ2_XS", np.zeros((1, 256), np.float32))


@pytest.mark.parametrize("wrong", [np.ones(5), np.full(256, -1.0), np.full(256, np.nan)])
def test_a_wrong_importance_is_refused(wrong):
    with pytest.raises(ModelError, match="importance"):
        quantize("Q4_K", np.ones((1, 256), np.float32), wrong.astype(np.float32))


def test_inputs_without_importance_do_not_spoil_the_others():
    values = samples("normal", 4, 256)
    values[:, ::2] *= 30
    importance = np.ones(256, np.float32)
    importance[::2] = 0
    kept = ours("Q4_K", values, importance)
    assert (
        error(values[:, 1::2], kept[:, 1::2])
        < error(values[:, 1::2], ours("Q4_K", values)[:, 1::2]) / 4
    )
    zero = np.zeros(256, np.float32)
    np.testing.assert_array_equal(ours("Q4_K", values, zero), ours("Q4_K", values))


def test_rows_do_not_depend_on_one_another():
    values = samples("normal", 300, 512)
    whole = quantize("Q4_K", values)
    np.testing.assert_array_equal(whole[123:124], quantize("Q4_K", values[123:124]))

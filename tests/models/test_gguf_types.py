"""Block types of GGUF: values equal the `gguf` package's bit for bit; matrices of blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats.gguf_types import OTHER_TYPES, TYPES, dequantize, type_name
from paceline.models.tensors import BlockQuantized, from_tensors

NAMES = sorted(TYPES)
REMOVED = {4, 5, 31, 32, 33, 36, 37, 38}


def random_rows(seed, name, rows, blocks):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (rows, blocks * TYPES[name].nbytes), np.uint8)


def oracle(name, rows):
    plain = {"F32": "<f4", "F16": "<f2"}.get(name)
    if plain:
        return rows.view(plain).astype(np.float32)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])


def test_the_table_has_the_sizes_and_numbers_of_the_package():
    for name, kind in TYPES.items():
        number = gguf.GGMLQuantizationType[name]
        assert (kind.name, kind.id) == (name, number.value)
        assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[number]
        assert kind.row_bytes(3 * kind.weights) == 3 * kind.nbytes


def test_every_type_of_the_package_has_a_name():
    for number in gguf.GGMLQuantizationType:
        assert type_name(number.value) == number.name
    assert {number for number in OTHER_TYPES if "removed" in OTHER_TYPES[number]} <= REMOVED
    assert "bitnet.cpp" in type_name(36)
    assert type_name(140) == "type 140 of ik_llama.cpp"
    assert type_name(77) == "type 77"


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_values_equal_those_of_the_package_bit_for_bit(name, seed, rows, blocks):
    data = random_rows(seed, name, rows, blocks)
    values, expected = dequantize(name, data), oracle(name, data)
    assert values.shape == expected.shape
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), ~numbers)
    np.testing.assert_array_equal(
        values[numbers].view(np.uint32), np.ascontiguousarray(expected)[numbers].view(np.uint32)
    )


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 2**32 - 1))
def test_values_are_finite_where_the_scales_say_so(name, seed):
    data = random_rows(seed, name, 1, 3)
    kind = TYPES[name]
    if kind.halves and seed % 2:  # most random blocks hold no infinity: make half of them so
        data[0, kind.nbytes + kind.halves[-1] + 1] |= 0x7C
    if name == "MXFP4" and seed % 2:
        data[0, 0] = 253 + seed % 3
        data[0, 1:] = 7  # 12, the largest code
    expected = bool(np.isfinite(dequantize(name, data)).all())
    said = kind.is_finite(data)
    if expected and not said:  # an infinite scale of codes that are all zero
        assert name not in ("F32", "F16", "BF16")
    assert expected or not said


@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_of_blocks_is_saved_and_cut_by_rows(name):
    data = random_rows(0, name, 7, 2)
    matrix = BlockQuantized(name, data, 2 * TYPES[name].weights)
    assert matrix.shape == (7, 2 * TYPES[name].weights)
    assert matrix.nbytes == data.nbytes
    assert matrix.format == name.lower()
    np.testing.assert_array_equal(matrix.dense(), dequantize(name, data))
    order = np.array([6, 0, 3])
    np.testing.assert_array_equal(matrix.rows(order).dense(), matrix.dense()[order])
    assert np.shares_memory(matrix.rows(slice(2, 5)).data, data)
    again = from_tensors(matrix.tensors())
    assert isinstance(again, BlockQuantized)
    assert again.type == name
    np.testing.assert_array_equal(again.data, data)


@pytest.mark.parametrize(
    ("kind", "data", "inputs", "message"),
    [
        ("Q4_k", np.zeros((1, 144), np.uint8), 256, "unknown block type 'Q4_k'"),
        ("Q4_K", np.zeros((1, 144), np.uint8), 255, "multiple of 256"),
        ("Q4_K", np.zeros((1, 143), np.uint8), 256, r"expected uint8 \[out, 144\]"),
        ("Q4_K", np.zeros((1, 144), np.int8), 256, "data is int8"),
        ("Q4_K", np.zeros(144, np.uint8), 256, "expected uint8"),
    ],
)
def test_what_is_no_matrix_of_blocks_is_refused(kind, data, inputs, message):
    with pytest.raises(ModelError, match=message):
        BlockQuantized(kind, data, inputs)


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ModelError, match="no whole blocks of Q8_0, which have 34 bytes"):
        dequantize("Q8_0", np.zeros((2, 33), np.uint8))

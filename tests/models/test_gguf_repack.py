"""Integers in groups as blocks of GGUF: the same values, or none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.models.formats.gguf_repack import block_type, is_exact, to_blocks
from paceline.models.formats.gguf_types import dequantize
from paceline.models.tensors import Grouped


def grouped(bits, group, zeros=None, scale=1.0, columns=128, **parts):
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (6, columns)).astype(np.uint8)
    shape = (6, -(-columns // group))
    scales = (scale * random.uniform(0.01, 1, shape)).astype(np.float16).astype(np.float32)
    points = None if zeros is None else random.integers(*zeros, shape).astype(np.uint16)
    return Grouped(bits, codes, scales, group, points, **parts)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([32, 64, 128, 256]),
    low=st.integers(0, 255),
    width=st.integers(1, 255),
    zeros=st.booleans(),
)
def test_the_values_are_the_same(bits, group, low, width, zeros):
    top = 1 << bits
    bounds = (low % top, min(low % top + width, top) + 1)
    matrix = grouped(bits, group, bounds if zeros else None)
    kind = block_type(matrix)
    if kind is None:
        assert (bits, zeros) == (8, True)
        return
    assert is_exact(matrix)
    np.testing.assert_array_equal(dequantize(kind, to_blocks(matrix, kind)), matrix.dense())


@pytest.mark.parametrize(
    ("bits", "zeros", "kind"),
    [
        (2, None, "Q4_0"),
        (4, None, "Q4_0"),
        (4, (7, 9), "Q5_0"),
        (5, None, "Q5_0"),
        (6, None, "Q8_0"),
        (8, None, "Q8_0"),
        (8, (0, 9), None),
        (3, (0, 8), "Q4_0"),
    ],
)
def test_the_smallest_type_that_holds_them_is_taken(bits, zeros, kind):
    assert block_type(grouped(bits, 32, zeros)) == kind


def test_what_blocks_cannot_hold_has_no_type():
    assert block_type(grouped(4, 48, columns=96)) is None
    assert block_type(grouped(4, 32, columns=80)) is None
    codes = grouped(4, 32).codes
    tiny = np.full((6, 4), 3.1e-7, np.float32)  # half precision rounds it by a tenth
    assert block_type(Grouped(4, codes, tiny, 32)) is None
    order = np.arange(128, dtype=np.int32) % 4
    assert block_type(grouped(4, 32, g_idx=order)) is None
    minima = np.zeros((6, 4), np.float32)
    assert block_type(grouped(4, 32, minima=minima)) is None
    assert block_type(grouped(4, 96, columns=96)) == "Q4_0"  # one group a row


def test_scales_are_rounded_like_values_in_half_precision():
    matrix = grouped(4, 32)
    fine = Grouped(4, matrix.codes, matrix.scales * np.float32(1.0003), 32)
    assert not is_exact(fine)
    blocks = to_blocks(fine, block_type(fine))
    np.testing.assert_allclose(dequantize("Q4_0", blocks), fine.dense(), rtol=2**-11)

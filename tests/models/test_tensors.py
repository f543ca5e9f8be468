"""Stored matrices: saved and read back bit for bit, their reference computed by hand, checked."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.formats.bits import (
    pack_bits,
    pack_fields,
    packed_size,
    unpack_bits,
    unpack_fields,
)
from paceline.models.tensors import (
    BitPlanes,
    BlockQuantized,
    Codebook,
    Dense,
    Grouped,
    Linear,
    LowRank,
    NestedCodes,
    Pivoted,
    RoundedInputs,
    SignBlocks,
    Sparse,
    Sum,
    TensorTrain,
    Transformed,
    TwoGrained,
    Widths,
    from_tensors,
    narrow,
    to_dense,
    widen,
)

F32 = np.float32
KINDS = ("F32", "F16", "BF16")
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def floats(random, shape, kind):
    """Random numbers that `kind` holds, as stored and as float32."""
    values = random.normal(size=shape).astype(F32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = stored if kind == "BF16" else values.astype(TYPES[kind])
    return stored, widen(stored, kind)


def grouped(random, rows, columns, kind="F32", bits=None, mode=None, group=None, order=None):
    bits = bits or int(random.integers(2, 9))
    group = group or int(random.integers(1, columns + 3))
    groups = -(-columns // group)
    mode = mode or random.choice(["plain", "zeros", "minima"])
    _, scales = floats(random, (rows, groups), kind)
    _, minima = floats(random, (rows, groups), kind)
    zeros = random.integers(0, (1 << bits) + 1, (rows, groups)).astype(np.uint16)
    order = random.random() < 0.3 if order is None else order
    return Grouped(
        bits,
        random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
        scales,
        group,
        zeros if mode == "zeros" else None,
        minima if mode == "minima" else None,
        random.integers(0, groups, columns).astype(np.int32) if order else None,
        kind,
    )


def codebook(random, rows, columns):
    dim = random.choice([d for d in range(1, columns + 1) if columns % d == 0])
    tables, many = int(random.integers(1, 4)), int(random.choice([1, 2, 16, 256, 300]))
    own = rows if random.random() < 0.5 else 1
    group = int(random.integers(1, columns + 1))
    scales = random.normal(size=(rows, -(-columns // group))).astype(F32)
    kind = str(random.choice(KINDS))
    _, entries = floats(random, (tables, own, many, dim), kind)
    _, scales = floats(random, scales.shape, kind)
    return Codebook(
        random.integers(0, many, (rows, columns // dim, tables)).astype(np.uint16),
        entries,
        scales if random.random() < 0.5 else None,
        group,
        kind,
    )


def two_grained(random, rows, columns):
    bits, step_bits, group = (int(random.integers(2, each)) for each in (9, 9, columns + 3))
    groups = -(-columns // group)
    mode = random.choice(["plain", "zeros", "levels"])

    def below(width, *shape):
        return random.integers(0, 1 << width, shape).astype(np.uint8)

    return TwoGrained(
        bits,
        below(bits, rows, columns),
        group,
        below(step_bits, rows, groups),
        step_bits,
        floats(random, (rows,), "F16")[1],
        below(bits, rows, groups) if mode == "zeros" else None,
        random.integers(-127, 128, 1 << bits).astype(np.int8) if mode == "levels" else None,
    )


def nested_codes(random, rows, columns):
    bits = int(random.integers(1, 6))
    count = int(random.integers(1, bits + 1))
    planes = random.random((bits, rows, columns)) < 0.5
    tables = [
        random.normal(size=(rows, 1 << width)).astype(np.float16)
        for width in range(bits - count + 1, bits + 1)
    ]
    losses = -np.sort(-random.random(count)).astype(F32)
    return NestedCodes(
        np.packbits(planes, axis=-1, bitorder="little"), tuple(tables), columns, losses
    )


def bit_planes(random, rows, columns):
    planes, group = int(random.integers(1, 4)), int(random.integers(1, columns + 1))
    groups = -(-columns // group)
    return BitPlanes(
        random.random((planes, rows, columns)) < 0.5,
        random.normal(size=(planes, rows, groups)).astype(F32),
        group,
        random.normal(size=(rows, groups)).astype(F32) if random.random() < 0.5 else None,
    )


def sparse(random, rows, columns, kind="F32"):
    if random.random() < 0.5 and columns % 4 == 0:
        kept = int(random.integers(1, 5))
        ranks = random.random((rows, columns // 4, 4)).argsort(-1)
        mask, pattern = (ranks < kept).reshape(rows, columns), (kept, 4)
    else:
        mask, pattern = random.random((rows, columns)) < random.choice([0, 0.03, 0.4]), None
    return Sparse(mask, floats(random, int(mask.sum()), kind)[0], kind, pattern)


def widths(random, rows, columns):
    bits = np.sort(random.permutation(range(2, 9))[: random.integers(1, 4)]).tolist()
    losses = -np.sort(-random.random(len(bits))).astype(F32)
    return Widths(tuple(grouped(random, rows, columns, "F16", each) for each in bits), losses)


def pivoted(random, rows, columns, depth):
    rank = int(random.integers(1, rows))
    pivots = np.sort(random.permutation(rows)[:rank]).astype(np.int32)
    parts = ((rank, columns), (rows - rank, rank))
    return Pivoted(pivots, *(any_form(random, *shape, depth + 1) for shape in parts))


def sign_blocks(random, rows, columns):
    blocks, rank = int(random.integers(1, 4)), int(random.integers(1, 4))
    return SignBlocks(
        random.integers(0, 256, (blocks, rows, packed_size(columns, 1))).astype(np.uint8),
        random.normal(size=(blocks, rows, rank)).astype(np.float16),
        random.normal(size=(blocks, rank, columns)).astype(np.float16),
        -np.sort(-random.random(blocks)).astype(F32),
    )


def tensor_train(random, rows, columns):
    first = [
        int(random.choice([d for d in range(1, size + 1) if size % d == 0]))
        for size in (rows, columns)
    ]
    second, bond = [rows // first[0], columns // first[1]], int(random.integers(1, 4))
    shapes = (1, first[0] * first[1] * bond), (bond, second[0] * second[1])
    cores = tuple(Dense(random.normal(size=shape).astype(F32)) for shape in shapes)
    return TensorTrain(cores, (first[0], second[0]), (first[1], second[1]))


def transformed(random, rows, columns, depth):
    left = int(random.choice([d for d in range(1, columns + 1) if columns % d == 0]))
    sizes = ((rows, columns), (left, left), (columns // left, columns // left))
    return Transformed(*(any_form(random, *size, depth + 1) for size in sizes))


def any_form(random, rows, columns, depth=0):
    kind = str(random.choice(KINDS))
    makers = [
        lambda: Dense(floats(random, (rows, columns), kind)[0], kind),
        lambda: grouped(random, rows, columns, kind),
        lambda: codebook(random, rows, columns),
        lambda: two_grained(random, rows, columns),
        lambda: nested_codes(random, rows, columns),
        lambda: bit_planes(random, rows, columns),
        lambda: sparse(random, rows, columns, kind),
        lambda: sign_blocks(random, rows, columns),
        lambda: tensor_train(random, rows, columns),
        lambda: widths(random, rows, columns),
    ]
    if depth < 2:
        rank = int(random.integers(1, 4))
        makers += [
            lambda: LowRank(
                any_form(random, rows, rank, depth + 1), any_form(random, rank, columns, depth + 1)
            ),
            lambda: Sum(tuple(any_form(random, rows, columns, depth + 1) for _ in range(1 + rank))),
            lambda: RoundedInputs(
                any_form(random, rows, columns, depth + 1),
                int(random.integers(2, 9)),
                np.flatnonzero(random.random(columns) < 0.3).astype(np.int32),
                int(random.choice([4, 8, 16])),
                None if random.random() < 0.5 else float(random.uniform(0.1, 9)),
            ),
        ]
        makers.append(lambda: transformed(random, rows, columns, depth))
        if rows > 1:
            makers.append(lambda: pivoted(random, rows, columns, depth))
    return makers[random.integers(len(makers))]()


def size_of(arrays):
    """Bytes of all arrays but the descriptions."""
    return sum(array.nbytes for name, array in arrays.items() if not name.endswith("meta"))


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_every_form_is_saved_and_read_back_bit_for_bit(seed, rows, columns):
    matrix = any_form(np.random.default_rng(seed), rows, columns)
    values = matrix.dense()
    assert matrix.shape == values.shape == (rows, columns)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    arrays = matrix.tensors()
    assert matrix.nbytes == size_of(arrays)
    assert "shape" not in json.loads(bytes(arrays["meta"]))  # files add it, see stored_forms
    again = from_tensors({name: array.copy() for name, array in arrays.items()})
    assert type(again) is type(matrix)
    np.testing.assert_array_equal(again.dense(), values)
    for name, array in again.tensors().items():
        np.testing.assert_array_equal(array, arrays[name])
    np.testing.assert_array_equal(np.asarray(matrix), values)
    np.testing.assert_array_equal(to_dense(matrix), values)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 12))
def test_rows_of_every_form(seed, rows, columns):
    random = np.random.default_rng(seed)
    matrix = any_form(random, rows, columns)
    order = random.permutation(rows)
    for index in (slice(1, None), slice(0, rows - 1), order, order[:1]):
        np.testing.assert_array_equal(matrix.rows(index).dense(), matrix.dense()[index])


def test_a_tensor_train_is_a_product_along_the_bonds():
    random = np.random.default_rng(0)
    outputs, inputs, bonds = (2, 3, 2), (3, 1, 2), (1, 4, 2, 1)
    cores = [
        random.normal(size=(bonds[k], outputs[k], inputs[k], bonds[k + 1])).astype(F32)
        for k in range(3)
    ]
    stored = tuple(Dense(core.reshape(len(core), -1)) for core in cores)
    matrix = TensorTrain(stored, outputs, inputs)
    expected = np.einsum("aoib,bpjc,cqkd->opqijk", *cores).reshape(12, 6)
    np.testing.assert_allclose(matrix.dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "smaller"), [(8, 0.7), (4, 0.8), (2, 1.0)])
def test_codes_of_zero_are_left_out_where_that_is_smaller(bits, smaller, zeros):
    random = np.random.default_rng(bits)
    whole = grouped(random, 24, 96, "F16", bits, "plain", 32, False)
    points = random.integers(0, 1 << bits, (24, 3)).astype(np.uint16) if zeros else None
    zero = np.repeat(points, 32, 1) if zeros else 1 << (bits - 1)
    gone = random.random((24, 96)) < (0.5 if smaller < 1 else 0)
    half = np.where(gone, zero, whole.codes).astype(np.uint8)
    pruned = Grouped(bits, half, whole.scales, 32, points, scale_type="F16")
    saved = pruned.tensors()
    assert ("mask" in saved) == (smaller < 1)
    assert pruned.nbytes == sum(each.nbytes for name, each in saved.items() if name != "meta")
    assert pruned.nbytes <= smaller * (24 * 96 * bits // 8) + 24 * 3 * 4
    again = from_tensors(saved)
    np.testing.assert_array_equal(again.codes, half)
    np.testing.assert_array_equal(again.dense(), pruned.dense())
    if "mask" in saved:
        saved["codes"] = saved["codes"][:-1]
        with pytest.raises(ModelError, match="codes are packed as"):
            from_tensors(saved)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9))
def test_grouped_is_each_code_less_its_zero_times_its_scale(seed, rows, columns):
    matrix = grouped(np.random.default_rng(seed), rows, columns)
    values = matrix.dense()
    for row, column in itertools.product(range(rows), range(columns)):
        at = column // matrix.group if matrix.g_idx is None else matrix.g_idx[column]
        code, scale = int(matrix.codes[row, column]), matrix.scales[row, at]
        if matrix.minima is not None:
            expected = F32(F32(F32(code) * scale) + matrix.minima[row, at])
        else:
            zero = 1 << (matrix.bits - 1) if matrix.zeros is None else int(matrix.zeros[row, at])
            expected = F32(F32(code - zero) * scale)
        assert values[row, column] == expected


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9))
def test_two_grained_scales_are_whole_multiples_in_half_precision(seed, rows, columns):
    matrix = two_grained(np.random.default_rng(seed), rows, columns)
    values = matrix.dense()
    for row, column in itertools.product(range(rows), range(columns)):
        at, code = column // matrix.group, int(matrix.codes[row, column])
        scale = F32(np.float16(F32(matrix.units[row] * F32(matrix.steps[row, at]))))
        if matrix.levels is not None:
            place = int(matrix.levels[code])
        else:
            half = 1 << (matrix.bits - 1)
            place = code - (half if matrix.zeros is None else int(matrix.zeros[row, at]))
        assert values[row, column] == F32(place) * scale
    if matrix.levels is None:
        np.testing.assert_array_equal(matrix.grouped.dense(), values)
    else:
        assert matrix.grouped is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 8))
def test_codebook_and_bit_planes_are_sums_in_order(seed, rows, columns):
    random = np.random.default_rng(seed)
    book, planes = codebook(random, rows, columns), bit_planes(random, rows, columns)
    dim = book.entries.shape[3]
    for row, column in itertools.product(range(rows), range(columns)):
        own = row if book.entries.shape[1] > 1 else 0
        total = F32(0)
        for table, code in enumerate(book.codes[row, column // dim]):
            total = F32(total + book.entries[table, own, code, column % dim])
        if book.scales is not None:
            total = F32(total * book.scales[row, column // book.group])
        assert book.dense()[row, column] == total
        total = F32(0)
        for plane, scales in zip(planes.planes, planes.scales, strict=True):
            scale = scales[row, column // planes.group]
            total = F32(total + (scale if plane[row, column] else -scale))
        if planes.offsets is not None:
            total = F32(total + planes.offsets[row, column // planes.group])
        assert planes.dense()[row, column] == total


def test_sparse_puts_values_where_the_mask_is():
    mask = np.array([[True, False, False, True], [False, True, True, False]])
    matrix = Sparse(mask, F32([1, 2, 3, 4]), pattern=(2, 4))
    np.testing.assert_array_equal(matrix.dense(), [[1, 0, 0, 2], [0, 3, 4, 0]])
    assert matrix.nbytes == 2 + 16


@pytest.mark.parametrize(
    ("columns", "kept"), [(2000, [3, 999, 1000, 1999]), (255, []), (256, [255])]
)
def test_few_entries_are_saved_as_gaps(columns, kept):
    mask = np.zeros((1, columns), bool)
    mask[0, kept] = True
    matrix = Sparse(mask, np.arange(len(kept), dtype=F32))
    arrays = matrix.tensors()
    assert "mask" not in arrays
    assert matrix.nbytes == arrays["gaps"].nbytes + 4 * len(kept) < columns // 8
    np.testing.assert_array_equal(from_tensors(arrays).dense(), matrix.dense())
    for wrong in ({"outputs": 3}, {"inputs": 10**12}, {"inputs": -1}, {"outputs": -1}):
        text = json.dumps({**json.loads(bytes(arrays["meta"])), **wrong}).encode()
        with pytest.raises(ModelError, match="gaps are uint8"):
            from_tensors({**arrays, "meta": np.frombuffer(text, np.uint8)})


def test_low_rank_adds_outer_products_in_order():
    random = np.random.default_rng(1)
    left, right = (random.normal(size=shape).astype(F32) for shape in ((3, 5), (5, 4)))
    product = LowRank(Dense(left), Dense(right)).dense()
    for row, column in itertools.product(range(3), range(4)):
        total = F32(0)
        for rank in range(5):
            total = F32(total + F32(left[row, rank] * right[rank, column]))
        assert product[row, column] == total
    part = Dense(product)
    np.testing.assert_array_equal(Sum((part, part)).dense(), product + product)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 70))
def test_packed_integers_come_back(seed, bits, count):
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, packed_size(count, bits))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)
    for row, one in zip(codes, packed, strict=True):
        whole = int.from_bytes(one.tobytes(), "little")
        assert [whole >> bits * i & ((1 << bits) - 1) for i in range(count)] == row.tolist()
    words = pack_fields(codes, bits)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(unpack_fields(words, bits)[:, :count], codes)
    if 32 % bits == 0:
        np.testing.assert_array_equal(words.view(np.uint8)[:, : packed.shape[1]], packed)


def test_types_hold_what_they_hold():
    exact = F32([[1, -0.5]])
    for kind in KINDS:
        np.testing.assert_array_equal(widen(narrow(exact, kind), kind), exact)
    for kind in ("F16", "BF16"):
        with pytest.raises(ModelError, match=f"no {kind} numbers"):
            narrow(F32([1 / 3]), kind)
    with pytest.raises(ModelError, match="no F16 numbers"):
        narrow(F32([1e6]), "F16")


CODES = np.zeros((2, 4), np.uint8)
SCALES = np.ones((2, 2), F32)
ENTRIES = np.zeros((1, 1, 2, 2), F32)
MASK = np.ones((1, 4), bool)
PLANES = np.ones((1, 2, 4), bool)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Dense(np.zeros(3, F32)), "expected two axes"),
        (lambda: Dense(np.zeros((1, 1), F32), "BF16"), "BF16 as uint16"),
        (lambda: Dense(np.zeros((1, 1), F32), "I8"), "for 'I8'"),
        (lambda: Grouped(1, CODES, SCALES, 2), "1 bits, expected 2 to 8"),
        (lambda: Grouped(4, CODES + 16, SCALES, 2), "uint8 below 16"),
        (lambda: Grouped(4, CODES.astype(np.int8), SCALES, 2), "uint8 below 16"),
        (lambda: Grouped(4, CODES, SCALES, 3, None), None),
        (lambda: Grouped(4, CODES, SCALES, 0), "groups have 0 inputs"),
        (lambda: Grouped(4, CODES, SCALES, 10**30), "groups have 1"),
        (lambda: Grouped(4, CODES, SCALES, 2.0), "groups have 2.0 inputs, expected a whole number"),
        (lambda: BitPlanes(PLANES, SCALES[None], 2.0), "expected a whole number"),
        (lambda: BlockQuantized("Q8_0", np.zeros((1, 34), np.uint8), 32.0), "has 32.0 inputs"),
        (lambda: Grouped(4, CODES, SCALES, 4), r"expected float32 \[2, 1\]"),
        (lambda: Grouped(4, CODES, SCALES * np.nan, 2), "scales hold NaN"),
        (lambda: Grouped(4, CODES, SCALES, 2, minima=SCALES * np.inf), "minima hold NaN"),
        (lambda: Grouped(4, CODES, SCALES * F32(1e38), 2), r"scales or minima reach 1e\+38"),
        (lambda: Grouped(4, CODES, SCALES, 2, scale_type="I8"), "saved as 'I8'"),
        (lambda: Grouped(4, CODES, SCALES / 3, 2, scale_type="F16").tensors(), "no F16 numbers"),
        (lambda: Grouped(4, CODES, SCALES, 2, np.full((2, 2), 17, np.uint16)), "up to 16"),
        (lambda: Grouped(4, CODES, SCALES, 2, np.zeros((2, 1), np.uint16)), r"uint16 \[2, 2\]"),
        (
            lambda: Grouped(4, CODES, SCALES, 2, np.zeros((2, 2), np.uint16), SCALES),
            "zero points or minima",
        ),
        (lambda: Grouped(4, CODES, SCALES, 2, g_idx=np.int32([0, 0, 1, 2])), "below the number"),
        (lambda: Grouped(4, CODES, SCALES, 2, g_idx=np.int32([0, -1, 1, 1])), "below the number"),
        (lambda: Grouped(4, CODES, SCALES, 2, g_idx=np.int32([0])), r"int32 \[4\]"),
        (lambda: TwoGrained(9, CODES, 2, CODES[:, :2], 4, SCALES[0]), "9 bits, expected 2 to 8"),
        (lambda: TwoGrained(4, CODES, 2, CODES[:, :2], 1, SCALES[0]), "scales have 1 bits"),
        (lambda: TwoGrained(4, CODES, 2, CODES, 4, SCALES[0]), r"steps are uint8 \[2, 4\]"),
        (lambda: TwoGrained(4, CODES + 16, 2, CODES[:, :2], 4, SCALES[0]), "below 16"),
        (lambda: TwoGrained(4, CODES, 2, CODES[:, :2] + 4, 2, SCALES[0]), "below 4"),
        (lambda: TwoGrained(4, CODES, 2, CODES[:, :2], 4, SCALES[0] * np.nan), "units hold NaN"),
        (
            lambda: TwoGrained(4, CODES, 2, CODES[:, :2] + 1, 4, SCALES[0] * F32(1e6)),
            "too large for scales in half",
        ),
        (
            lambda: TwoGrained(
                4, CODES, 2, CODES[:, :2], 4, SCALES[0], levels=np.zeros(4, np.int8)
            ),
            r"expected int8 \[16\]",
        ),
        (
            lambda: TwoGrained(
                2, CODES, 2, CODES[:, :2], 4, SCALES[0], CODES[:, :2], np.zeros(4, np.int8)
            ),
            "zero points or a table",
        ),
        (lambda: Codebook(CODES.astype(np.uint16)[..., None], ENTRIES, float_type="I8"), "as 'I8'"),
        (lambda: Codebook(CODES.astype(np.uint16), ENTRIES), "expected uint16"),
        (lambda: Codebook(np.full((1, 2, 1), 2, np.uint16), ENTRIES), "a code is 2"),
        (lambda: Codebook(np.zeros((3, 2, 1), np.uint16), ENTRIES.repeat(2, 1)), "1 or 3"),
        (lambda: Codebook(np.zeros((1, 2, 2), np.uint16), ENTRIES), r"float32 \[2, 1, 2, 2\]"),
        (lambda: BitPlanes(PLANES[0], SCALES, 2), "expected bool"),
        (lambda: BitPlanes(PLANES, SCALES, 2), r"expected float32 \[1, 2, 2\]"),
        (lambda: Sparse(MASK, np.ones(3, F32)), "expected the 4 that are kept"),
        (lambda: Sparse(MASK, np.full(4, np.inf, F32)), "NaN or infinite"),
        (lambda: Sparse(MASK, np.ones(4, F32), pattern=(2, 4)), "2 of every 4"),
        (lambda: Sparse(MASK, np.ones(4, F32), pattern=(3, 3)), "3:3 for 4 inputs"),
        (lambda: LowRank(Dense(SCALES), Dense(np.ones((3, 2), F32))), "rows of the second"),
        (
            lambda: Transformed(*(Dense(np.ones(size, F32)) for size in ((2, 6), (2, 2), (2, 2)))),
            "sizes multiply to the 6 inputs",
        ),
        (lambda: Pivoted(np.int32([1]), Dense(SCALES[:1]), Dense(SCALES)), "expected 1 columns"),
        (
            lambda: Pivoted(np.int32([1, 0]), Dense(SCALES), Dense(SCALES[:1])),
            r"expected int32 \[2\], ascending and below 3",
        ),
        (lambda: TensorTrain((Dense(SCALES),), (2,), (2,)), "at least two"),
        (lambda: TensorTrain((Dense(SCALES[:1, :1]),) * 40, (1,) * 40, (1,) * 40), "at most 16"),
        (
            lambda: TensorTrain((Dense(SCALES[:1]), Dense(SCALES)), (1, 2), (2, 1)),
            "expected 1 x 2 x 2",
        ),
        (lambda: RoundedInputs(Dense(SCALES), 1, np.int32([0])), "1 and 8 bits"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int32([0]), 9), "4 and 9 bits"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int32([1, 1])), "ascending below 2"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int32([2])), "ascending below 2"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int64([1])), "expected int32"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int32([1]), 8, 0.0), "limit of the inputs"),
        (lambda: RoundedInputs(Dense(SCALES), 4, np.int32([1]), 8, np.nan), "limit of the inputs"),
        (lambda: Sum(()), "expected one shape"),
        (lambda: Sum((Dense(SCALES), Dense(SCALES[:1]))), "expected one shape"),
        (lambda: from_tensors({}), "describe no stored matrix"),
        (lambda: from_tensors({"meta": np.frombuffer(b'{"form": "X"}', np.uint8)}), "describe no"),
        (lambda: from_tensors({"meta": np.frombuffer(b"[]", np.uint8)}), "describe no"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(make, said):
    if said is None:
        assert isinstance(make(), Linear)
        return
    with pytest.raises(ModelError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(40))
def test_a_missing_array_is_refused(seed):
    arrays = any_form(np.random.default_rng(seed), 2, 4).tensors()
    optional = ("zeros", "minima", "g_idx", "offsets", "scales")
    for name in arrays:
        if not name.endswith(optional):
            with pytest.raises(ModelError, match=r"describe no stored matrix|is missing"):
                from_tensors({other: arrays[other] for other in arrays if other != name})


@pytest.mark.parametrize("inputs", [0, -1, 3, 17, 10**12, 10**30, 1.5, None])
@pytest.mark.parametrize("make", [grouped, two_grained, nested_codes, bit_planes, sparse])
def test_a_width_that_the_bytes_do_not_have_is_refused(make, inputs):
    """Whatever a file claims, no more is allocated than it holds."""
    arrays = dict(make(np.random.default_rng(0), 3, 16).tensors())
    meta = json.loads(bytes(arrays["meta"]))
    text = json.dumps({**meta, "inputs": inputs}).encode()
    with pytest.raises(ModelError) as caught:
        from_tensors({**arrays, "meta": np.frombuffer(text, np.uint8)})
    assert "\n" not in str(caught.value)


def test_a_transformed_matrix_multiplies_transformed_inputs():
    random = np.random.default_rng(0)
    matrix, left, right = (
        random.normal(size=size).astype(F32) for size in ((5, 12), (3, 3), (4, 4))
    )
    form = Transformed(Dense(matrix), Dense(left), Dense(right))
    x = random.normal(size=12).astype(F32)
    expected = matrix @ (left @ x.reshape(3, 4) @ right.T).ravel()
    np.testing.assert_allclose(form.dense() @ x, expected, rtol=1e-4, atol=1e-5)

"""Packed floating-point numbers: every bit comes back, and damaged files are one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.models.tensors import Dense, PackedFloats, from_tensors, pack_smallest

TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
BITS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
CHUNK = 1 << 18


def random_bits(random, count, kind):
    return random.integers(0, 1 << (8 * np.dtype(BITS[kind]).itemsize), count, BITS[kind])


def gaussian(random, count, kind, scale=0.02):
    values = random.normal(scale=scale, size=count).astype(np.float32)
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(TYPES[kind]).view(BITS[kind])


def special(random, count, kind):
    """NaN with payloads, infinities, zeros of both signs, denormals and powers of two."""
    width = 8 * np.dtype(BITS[kind]).itemsize
    mantissa = {"F32": 23, "F16": 10, "BF16": 7}[kind]
    full = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    some = [0, 1, full, full | 1, full | 1 << (mantissa - 1), (1 << mantissa) - 1, 1 << mantissa]
    some += [value | 1 << (width - 1) for value in some]
    return random.choice(np.array(some, BITS[kind]), count)


def widened(random, count, kind):
    """Numbers that hold fewer bits than their type."""
    bits = gaussian(random, count, kind)
    return bits & ~BITS[kind](0xFFFF if kind == "F32" else 0x7)


def pruned(random, count, kind):
    return gaussian(random, count, kind) * (random.random(count) < 0.4)


def constant(random, count, kind):
    return np.full(count, random_bits(random, 1, kind)[0])


MAKERS = (random_bits, gaussian, special, widened, pruned, constant)


def matrix(bits, rows, columns, kind):
    values = np.asarray(bits, BITS[kind]).reshape(rows, columns)
    return Dense(values.view(TYPES[kind]), kind)


def assert_same(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.values.tobytes() == other.values.tobytes()


def check(dense, masked, threads=1):
    packed = PackedFloats.of(dense, masked, threads)
    arrays = packed.tensors()
    assert packed.nbytes == sum(array.nbytes for name, array in arrays.items() if name != "meta")
    again = from_tensors({name: array.copy() for name, array in arrays.items()})
    assert isinstance(again, PackedFloats)
    assert again.shape == dense.shape
    assert_same(again.unpack(threads), dense)
    return packed


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(MAKERS),
    st.sampled_from(sorted(TYPES)),
    st.integers(0, 40),
    st.integers(0, 90),
    st.booleans(),
)
def test_every_bit_comes_back(seed, make, kind, rows, columns, masked):
    bits = make(np.random.default_rng(seed), rows * columns, kind)
    dense = matrix(bits, rows, columns, kind)
    packed = check(dense, masked)
    np.testing.assert_array_equal(packed.dense(), dense.dense())
    if rows:
        assert_same(packed.rows(slice(0, 1)), dense.rows(slice(0, 1)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.parametrize("make", MAKERS)
def test_several_chunks_on_several_threads(make, kind, masked):
    rows, columns = 3, CHUNK - 1
    bits = make(np.random.default_rng(0), rows * columns, kind)
    one = check(matrix(bits, rows, columns, kind), masked)
    other = check(matrix(bits, rows, columns, kind), masked, threads=3)
    np.testing.assert_array_equal(one.data, other.data)


def test_skewed_counts_keep_codes_short():
    """Counts like Fibonacci's would have codes as long as their number without a limit."""
    counts = [1, 1]
    while sum(counts) < CHUNK // 2:
        counts.append(counts[-1] + counts[-2])
    bits = np.repeat(np.arange(len(counts), dtype=np.uint16) << 7, counts)
    check(matrix(bits, 1, len(bits), "BF16"), masked=False)


def test_sizes_of_natural_and_special_matrices():
    random = np.random.default_rng(0)
    rows, columns = 1024, 1024
    share = {}
    for kind in TYPES:
        dense = matrix(gaussian(random, rows * columns, kind), rows, columns, kind)
        share[kind] = PackedFloats.of(dense).nbytes / dense.nbytes
    assert share["BF16"] < 0.67
    assert share["F32"] < 0.84
    assert share["F16"] < 0.87
    dense = matrix(widened(random, rows * columns, "F32"), rows, columns, "F32")
    assert PackedFloats.of(dense).nbytes < 0.336 * dense.nbytes


def test_the_smallest_form_is_taken():
    random = np.random.default_rng(0)
    count = 1 << 16
    noise = matrix(random_bits(random, count, "F32"), 256, 256, "F32")
    assert pack_smallest(noise) is noise
    natural = pack_smallest(matrix(gaussian(random, count, "BF16"), 256, 256, "BF16"))
    assert isinstance(natural, PackedFloats)
    assert natural.mask is None
    sparse = pack_smallest(matrix(pruned(random, count, "BF16"), 256, 256, "BF16"))
    assert isinstance(sparse, PackedFloats)
    assert sparse.mask is not None
    assert sparse.nbytes < 2 * count * (1 / 16 + 0.4 * 0.69)
    assert sparse.nbytes < PackedFloats.of(sparse.unpack()).nbytes
    few = gaussian(random, count, "BF16") * (random.random(count) < 0.85)
    some = matrix(few, 256, 256, "BF16")
    sizes = [PackedFloats.of(some, masked).nbytes for masked in (False, True)]
    assert pack_smallest(some).nbytes == min(sizes) < max(sizes)


def test_no_chunk_takes_less_than_a_bit_for_each_number():
    zeros = matrix(np.zeros(CHUNK, np.uint32), 1, CHUNK, "F32")
    assert CHUNK / 8 <= PackedFloats.of(zeros).data.nbytes < CHUNK / 8 + 200


def parts(kind="BF16", masked=False, make=pruned, seed=0):
    bits = make(np.random.default_rng(seed), 64 * 65, kind)
    dense = matrix(bits, 64, 65, kind)
    return dense, PackedFloats.of(dense, masked).tensors()


def read(arrays):
    form = from_tensors(arrays)
    assert isinstance(form, PackedFloats)
    return form.unpack()


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(sorted(TYPES)))
def test_a_flipped_bit_is_found(seed, masked, kind):
    dense, arrays = parts(kind, masked)
    random = np.random.default_rng(seed)
    name = str(random.choice(["data", "data", "sizes", "checksums", "mask"]))
    raw = bytearray(arrays.get(name, arrays["data"]).tobytes())
    name = name if name in arrays else "data"
    raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
    try:
        again = read({**arrays, name: np.frombuffer(raw, arrays[name].dtype)})
    except ModelError:
        return
    assert name == "data"  # a bit that fills the last byte of a stream means nothing
    assert_same(again, dense)


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(TYPES)))
def test_garbage_is_refused_or_read_and_never_a_crash(seed, kind):
    _, arrays = parts(kind)
    random = np.random.default_rng(seed)
    raw = arrays["data"].copy()
    begin = int(random.integers(len(raw)))
    end = min(len(raw), begin + int(random.integers(1, 200)))
    raw[begin:end] = random.integers(0, 256, end - begin, np.uint8)
    if random.random() < 0.5:  # sizes of streams, whose place is known
        raw[128:144] = random.integers(0, 256, 16, np.uint8)
    with pytest.raises(ModelError, match="damaged"):
        read({**arrays, "data": raw})


@pytest.mark.parametrize("name", ["data", "sizes", "checksums", "mask"])
@pytest.mark.parametrize("cut", [1, 4, 100, 10**6])
def test_a_part_that_is_cut_or_too_long_is_refused(name, cut):
    _, arrays = parts(masked=True)
    longer = np.concatenate([arrays[name], np.zeros(min(cut, 999), arrays[name].dtype)])
    for values in (arrays[name][: max(len(arrays[name]) - cut, 0)], longer):
        with pytest.raises(ModelError) as caught:
            read({**arrays, name: values})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"size": [64, 66]},
        {"size": [65, 65]},
        {"size": [-64, -65]},
        {"size": [0, 0]},
        {"size": [64.0, 65]},
        {"size": [True, 65]},
        {"size": [10**12, 10**12], "kept": 10**24},
        {"size": [1 << 20, 1 << 20], "kept": 1 << 40},
        {"size": 7},
        {"size": [64]},
        {"size": [64, 65, 1]},
        {"kept": -1},
        {"kept": 10**30},
        {"kept": None},
        {"dtype": "F32"},
        {"dtype": "I8"},
        {"dtype": ["BF16"]},
    ],
)
def test_lies_about_sizes_are_refused_and_nothing_large_is_allocated(change, masked):
    _, arrays = parts(masked=masked)
    meta = json.loads(bytes(arrays["meta"])) | change
    with pytest.raises(ModelError) as caught:
        read({**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    assert "\n" not in str(caught.value)


def test_a_huge_matrix_of_little_data_is_refused():
    _, arrays = parts(make=gaussian)
    side, chunks = 1 << 14, 1 << 10
    meta = json.loads(bytes(arrays["meta"])) | {"size": [side, side], "kept": side * side}
    claims = {
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "data": np.zeros(2 * chunks, np.uint8),
        "sizes": np.ones(2 * chunks, np.uint32),
        "checksums": np.zeros(chunks, np.uint64),
    }
    with pytest.raises(ModelError, match="cannot hold"):
        read(claims)


def test_a_bitmap_with_another_number_of_bits_is_refused():
    _, arrays = parts(masked=True)
    mask = arrays["mask"].copy()
    mask[3] ^= 1
    with pytest.raises(ModelError, match="does not have a bit for each"):
        read({**arrays, "mask": mask})


@pytest.mark.parametrize("name", ["data", "sizes", "checksums"])
@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_a_part_of_another_type_is_refused(name, kind):
    _, arrays = parts()
    with pytest.raises(ModelError, match="expected uint"):
        read({**arrays, name: arrays[name].astype(kind)})

"""Integers most of which are zero run without their zeros: a file's values, the same sums."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.engines.byte_activations import KINDS
from paceline.engines.formats import FORMATS, HEADS, SPARSE_FORMATS, parse_format
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import Blocks
from paceline.errors import MethodError
from paceline.models.tensors import Grouped, Linear
from tests.engines.test_block_formats import VOCAB, check_products, config, weights_of
from tests.engines.test_byte_activations import check_head, in_bytes, outliers
from tests.engines.test_group_formats import dense, integers, load_block, put
from tests.engines.test_native import ISAS, check_every_bit, run

GROUPS = (1, 2, 4, 99)  # blocks that share a scale; the last is all of a row


def sparse(random, name: str, rows: int, inputs: int, group: int) -> Blocks:
    """Random integers with as many zeros as a format wants."""
    block = integers(random, f"group{name[-1]}", rows, inputs, group)
    zero, codes = 1 << (block.bits - 1), block.codes
    if name.startswith("pairs"):
        order = random.random((rows, inputs // 4, 4)).argsort(-1)
        kept = (order < random.integers(0, 3, (rows, inputs // 4, 1))).reshape(rows, inputs)
    else:
        kept = random.random((rows, inputs)) < random.uniform(0, 1, (rows, 1))
    codes[~kept] = zero
    return block


def load_sparse(model, weights, *_) -> str:
    matrices = {name: each for name, each in weights.items() if isinstance(each, tuple)}
    for name, (form, block) in matrices.items():
        model.set_format(name, form, False, block.group_in(form))
    for name, weight in weights.items():
        if name in matrices:
            load_block(model, name, weight[1])
        else:
            model.set(name, weight)
    return "sparse"


def open_sparse(shape, name_of, seed: int = 0, **options) -> NativeEngine:
    """An engine whose matrices are of the formats and groups that `name_of()` returns."""
    random = np.random.default_rng(seed)
    weights = weights_of(shape, lambda _: "Q8_0")
    for part, weight in weights.items():
        if isinstance(weight, Linear):
            name, group = name_of()
            group = min(group, -(-weight.shape[1] // 32))
            weights[part] = (name, sparse(random, name, *weight.shape, group))
    weights["final_norm"] = outliers(random, shape.hidden_size)
    with mock.patch("paceline.engines.native.load_weights", load_sparse):
        engine = NativeEngine(shape, weights, **options)
    engine._model.worth_waking = 0
    engine.head_values = dense(weights["embed"][1])
    return engine


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPARSE_FORMATS)
def test_every_value_is_that_of_the_file(name: str, isa: str) -> None:
    random = np.random.default_rng(0)
    for hidden, group in ((608, 1), (608, 3), (36, 4), (608, 19)):
        shape = config(hidden, 256)
        model = _native.NativeModel(shape, "fp32", "fp32", "fp32", isa, 2)
        block = sparse(random, name, VOCAB, hidden, min(group, -(-hidden // 32)))
        assert block.fits(name)
        put(model, "embed", name, block, block.group_in(name))
        np.testing.assert_array_equal(model.get("embed"), dense(block))


def test_half_of_the_weights_take_little_more_than_half_the_bits() -> None:
    assert not set(SPARSE_FORMATS) & set(FORMATS + HEADS)
    random = np.random.default_rng(0)
    block = sparse(random, "pairs8", 64, 2048, 2)
    exact = {"pairs8": 4 + 0.75, "bitmap8": (block.codes != 128).mean() * 8 + 1}
    for name, bits in exact.items():
        assert bits + 0.25 <= block.bits_in(name) < bits + 0.25 + 0.5
    assert _native.format_bits("pairs4", 2048, 2) < 2 + 0.75 + 0.25 + 0.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPARSE_FORMATS)
def test_products_differ_from_exact_ones_by_rounding(name: str, isa: str) -> None:
    """By that of activations, and of two fp32 sums for each block."""
    shape = config(608, 256)
    engine = open_sparse(shape, lambda: (name, 2), isa=isa, threads=2)
    check_products(
        engine, engine.head_values, (1, 2, 3, 4, 7, 12, 13, 24, 25, 40), shape.hidden_size / 16 * 20
    )
    check_head(in_bytes(engine, ["head"]), engine.head_values)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Whatever the formats, the tree, the chunks, the threads and the instruction set."""
    shape = config(data.draw(st.sampled_from((32, 288, 320))), 96, data.draw(st.booleans()))
    mixed, seed = data.draw(st.booleans()), data.draw(st.integers(0, 9))
    random = np.random.default_rng(seed)
    one = (data.draw(st.sampled_from(SPARSE_FORMATS)), data.draw(st.sampled_from(GROUPS)))

    def name_of() -> tuple[str, int]:
        if not mixed:
            return one
        return str(random.choice(SPARSE_FORMATS)), int(random.choice(GROUPS))

    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_sparse(shape, name_of, seed, isa=isa, threads=threads)
    in_bytes(engine, data.draw(st.lists(st.sampled_from(KINDS), unique=True)))
    check_every_bit(engine, random, data)


@pytest.mark.parametrize("name", SPARSE_FORMATS)
def test_instruction_sets_agree_in_every_bit_where_sums_are_fused(name: str) -> None:
    ids = np.arange(40, dtype=np.int32) % 30
    engines = [open_sparse(config(288, 96), lambda: (name, 2), isa=isa) for isa in ISAS]
    for kinds in ([], KINDS):
        found = {engine.isa: run(in_bytes(engine, kinds), ids, 40) for engine in engines}
        plain = found.pop("portable")
        first = next(iter(found.values()), plain)
        for other in found.values():
            np.testing.assert_array_equal(other, first)
        assert np.median(np.abs(first - plain)) <= 2e-2 * np.abs(plain).max()


def test_what_a_format_does_not_hold_is_refused() -> None:
    random, shape = np.random.default_rng(0), config(256, 256)

    def refuses(message: str, form: str, block: Blocks, group: int) -> None:
        model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
        with pytest.raises(ValueError, match=message):
            put(model, "embed", form, block, group)

    pairs = sparse(random, "pairs8", VOCAB, 256, 2)
    pairs.codes[5, 8:12] = (1, 2, 3, 128)
    refuses("cannot be kept as it is in pairs8", "pairs8", pairs, 2)
    assert not pairs.fits("pairs8")
    assert pairs.fits("bitmap8")
    assert not pairs.fits("pairs4")
    bitmap = sparse(random, "bitmap8", VOCAB, 256, 2)
    room = bitmap.group_in("bitmap8")
    bitmap.codes[:] = 5
    refuses("more weights than its format was told", "bitmap8", bitmap, room)
    refuses("has groups of no inputs", "bitmap8", bitmap, room >> 32 << 32)
    for name in SPARSE_FORMATS:
        with pytest.raises(MethodError, match="holds only weights that a checkpoint stores so"):
            parse_format(name)


def test_a_matrix_without_most_of_its_weights_is_kept_in_the_smallest_format() -> None:
    random = np.random.default_rng(0)
    places = np.arange(256)
    for bits, kept, form in (
        (8, places % 4 < 2, "pairs8"),
        (4, places % 4 < 2, "pairs4"),
        (8, places % 8 < 4, "bitmap8"),
        (8, places % 8 < 1, "bitmap8"),  # two of every four, too, and smaller
        (8, places % 8 < 7, "group8"),  # a bitmap is smaller, and not worth its time
    ):
        zero = 1 << (bits - 1)
        codes = random.integers(1, zero, (48, 256)).astype(np.uint8)
        codes[:, ~kept] = zero
        scales = np.full((48, 4), 0.25, np.float32)
        block = Blocks.of(Grouped(bits, codes, scales, 64, scale_type="F16"))
        assert block is not None
        assert block.kept_in(("int8", "int4", "group4", "group8", *SPARSE_FORMATS)) == form

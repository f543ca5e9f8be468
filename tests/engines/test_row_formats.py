"""Codes with tables of their own, or scales of small groups, run as they are stored."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.engines.formats import ROW_FORMATS
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import expands
from paceline.engines.row_codes import Rows
from paceline.models.tensors import Codebook, Grouped, Linear, NestedCodes, TwoGrained
from tests.engines.test_block_formats import VOCAB, check_products, config, weights_of
from tests.engines.test_byte_activations import outliers
from tests.engines.test_native import ISAS, check_every_bit, run


def drawn(random, name: str, rows: int, inputs: int, group: int) -> Linear:
    """A random matrix that a format of rows holds."""
    bits = int(next(letter for letter in name if letter.isdigit()))
    codes = random.integers(0, 1 << bits, (rows, inputs)).astype(np.uint8)
    if name.startswith("table"):
        entries = random.standard_normal((1, rows, 1 << bits, 1)).astype(np.float16) * 0.1
        return Codebook(codes.astype(np.uint16)[..., None], entries.astype(np.float32))
    groups = -(-inputs // group)
    if name.endswith("fp16"):
        scales = random.uniform(-0.2, 0.2, (rows, groups)).astype(np.float16).astype(np.float32)
        return Grouped(bits, codes, scales, group, scale_type="F16")
    steps = random.integers(0, 64, (rows, groups)).astype(np.uint8)
    units = random.uniform(-1e-3, 1e-3, rows).astype(np.float16).astype(np.float32)
    levels = np.sort(random.integers(-128, 128, 1 << bits)).astype(np.int8)
    return TwoGrained(bits, codes, group, steps, 6, units, None, levels)


def load_rows(model, weights, *_) -> str:
    packed = {name: Rows.of(each) for name, each in weights.items() if isinstance(each, Linear)}
    for name, rows in packed.items():
        model.set_format(name, rows.format, False, rows.group)
    for name, weight in weights.items():
        if name in packed:
            model.load_blocks(name, packed[name].data, packed[name].inputs)
        else:
            model.set(name, weight)
    return "rows"


def open_rows(shape, name_of, seed: int = 0, **options) -> NativeEngine:
    """An engine whose matrices are of the formats and groups that `name_of()` returns."""
    random = np.random.default_rng(seed)
    weights = weights_of(shape, lambda _: "Q8_0")
    for part, weight in weights.items():
        if isinstance(weight, Linear):
            weights[part] = drawn(random, name_of()[0], *weight.shape, name_of()[1])
    weights["final_norm"] = outliers(random, shape.hidden_size)
    with mock.patch("paceline.engines.native.load_weights", load_rows):
        engine = NativeEngine(shape, weights, **options)
    engine._model.worth_waking = 0
    engine.head_values = weights["embed"].dense()
    return engine


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_every_value_is_that_of_the_matrix(name: str, isa: str) -> None:
    random = np.random.default_rng(0)
    for hidden, group in ((608, 16), (100, 4), (1160, 8)):
        model = _native.NativeModel(config(hidden, 256), "fp32", "fp32", "fp32", isa, 2)
        matrix = drawn(random, name, VOCAB, hidden, group)
        rows = Rows.of(matrix)
        assert rows is not None
        assert rows.format == name
        assert not expands(matrix)
        model.set_format("embed", name, False, rows.group)
        model.load_blocks("embed", rows.data, hidden)
        np.testing.assert_array_equal(model.get("embed"), matrix.dense())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_products_differ_from_exact_ones_by_rounding(name: str, isa: str) -> None:
    """By that of activations to int16 where levels are multiplied, and of fp32 sums."""
    shape = config(608, 256)
    for group in (4, 8, 16):
        engine = open_rows(shape, lambda group=group: (name, group), isa=isa, threads=2)
        check_products(engine, engine.head_values, (1, 2, 3, 5, 6, 7, 13, 40), 64)
        if name.startswith("table"):
            break


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Whatever the formats, the tree, the chunks, the threads and the instruction set."""
    shape = config(data.draw(st.sampled_from((32, 288, 320))), 96, data.draw(st.booleans()))
    mixed, seed = data.draw(st.booleans()), data.draw(st.integers(0, 9))
    random = np.random.default_rng(seed)
    one = (data.draw(st.sampled_from(ROW_FORMATS)), data.draw(st.sampled_from((4, 8, 16))))

    def name_of() -> tuple[str, int]:
        if not mixed:
            return one
        return str(random.choice(ROW_FORMATS)), int(random.choice((4, 8, 16)))

    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_rows(shape, name_of, seed, isa=isa, threads=threads)
    check_every_bit(engine, random, data)


@pytest.mark.parametrize("name", ["table3", "table6", "table8", "fine2", "fine3_fp16", "fine4"])
def test_instruction_sets_agree_in_every_bit_where_sums_are_fused(name: str) -> None:
    ids = np.arange(40, dtype=np.int32) % 30
    engines = [open_rows(config(288, 96), lambda: (name, 8), isa=isa) for isa in ISAS]
    found = {engine.isa: run(engine, ids, 40) for engine in engines}
    plain = found.pop("portable")
    first = next(iter(found.values()), plain)
    for other in found.values():
        np.testing.assert_array_equal(other, first)
    assert np.median(np.abs(first - plain)) <= 2e-2 * np.abs(plain).max()


def test_each_width_of_nested_codes_is_held_in_its_own_bits() -> None:
    random = np.random.default_rng(0)
    planes = random.integers(0, 256, (8, 256, 24)).astype(np.uint8)
    tables = tuple(random.standard_normal((256, 1 << w)).astype(np.float16) for w in range(3, 9))
    losses = np.linspace(1, 0.1, 6, dtype=np.float32)
    whole = NestedCodes(planes, tables, 192, losses)
    for count, width in enumerate(range(3, 9), 1):
        matrix = whole.first(count)
        rows = Rows.of(matrix)
        assert rows is not None
        assert rows.format == f"table{width}"
        assert rows.data.shape[1] == 2 * (1 << width) + 192 * width // 8
        model = _native.NativeModel(config(192, 256), "fp32", "fp32", "fp32", "", 1)
        model.set_format("layers.0.up", rows.format)
        with pytest.raises(ValueError, match="bytes a row, expected"):
            model.load_blocks("layers.0.up", rows.data[:, :-1].copy(), 192)
        assert not expands(matrix)


def test_what_no_format_of_rows_holds_is_left_to_others() -> None:
    random = np.random.default_rng(0)
    odd = Codebook(
        random.integers(0, 16, (8, 32, 1)).astype(np.uint16),
        random.standard_normal((1, 1, 16, 1)).astype(np.float32),
    )
    assert Rows.of(odd) is None
    many = random.standard_normal((1, 1, 257, 1)).astype(np.float16).astype(np.float32)
    assert Rows.of(Codebook(odd.codes, many)) is None
    assert expands(Codebook(odd.codes, many))
    pairs = Codebook(odd.codes, random.standard_normal((1, 1, 16, 2)).astype(np.float32))
    assert Rows.of(pairs) is None
    fine = drawn(random, "fine4_fp16", 8, 32, 16)
    assert Rows.of(Grouped(4, fine.codes, fine.scales / 3, 16)) is None
    zeros = np.zeros_like(fine.scales, np.uint16)
    assert Rows.of(Grouped(4, fine.codes, fine.scales, 16, zeros)) is None
    whole = Codebook(
        fine.codes.astype(np.uint16)[..., None],
        np.arange(-8, 8, dtype=np.float32).reshape(1, 1, 16, 1),
        fine.scales,
        16,
    )
    rows = Rows.of(whole)
    assert rows is not None
    np.testing.assert_array_equal(rows.data, Rows.of(fine).data)

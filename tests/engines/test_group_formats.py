"""Integers in groups of any size run in their own bits: a file's values, the same sums."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.engines.byte_activations import KINDS
from paceline.engines.formats import FORMATS, GROUP_FORMATS, HEADS, parse_format
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import Blocks
from paceline.errors import MethodError
from paceline.models.tensors import Grouped, Linear
from tests.engines.test_block_formats import VOCAB, check_products, config, weights_of
from tests.engines.test_byte_activations import check_head, in_bytes, outliers
from tests.engines.test_native import ISAS, check_every_bit, run, tiny_model

__all__ = ["tiny_model"]  # a fixture

GROUPS = (1, 2, 4, 99)  # blocks that share a scale; the last is all of a row


def halves(random, shape) -> np.ndarray:
    """Scales of fp16."""
    drawn = random.uniform(0.2, 1, shape) * random.choice([-1, 1], shape)
    return drawn.astype(np.float16).astype(np.float32)


def integers(random, name: str, rows: int, inputs: int, group: int) -> Blocks:
    """Random codes and scales as a format holds them."""
    bits = int(next(letter for letter in name if letter.isdigit()))
    count = -(-inputs // 32)
    groups = -(-count // group)
    codes = random.integers(0, 1 << bits, (rows, inputs)).astype(np.uint8)
    starts = (np.arange(count) // group).astype(np.int32)
    zeros = steps = levels = None
    scales = halves(random, (rows, groups)) * np.float32(2.0 ** (-bits - 2))
    if name.endswith("zero"):
        zeros = random.integers(0, 1 << bits, (rows, groups)).astype(np.uint16)
    if not name.startswith("group"):
        steps = random.integers(0, 64, (rows, groups)).astype(np.uint8)
        scales = halves(random, (rows, 1)) * np.float32(2.0 ** (-bits - 7))
    if name.startswith("levels"):
        levels = random.integers(-128, 128, 1 << bits).astype(np.int8)
        scales = scales * np.float32(2.0 ** (bits - 8))
    scales = scales.astype(np.float16).astype(np.float32)
    return Blocks(bits, codes, scales, zeros, starts, steps=steps, levels=levels)


def dense(block: Blocks) -> np.ndarray:
    """The values of integers in float32: the slow reference."""
    at = block.block_groups[np.arange(block.codes.shape[1]) // 32]
    scales = block.scales
    if block.steps is not None:
        product = scales * block.steps.astype(np.float32)
        scales = product.astype(np.float16).astype(np.float32)
    if block.levels is not None:
        return block.levels.astype(np.float32)[block.codes] * scales[:, at]
    zeros = np.float32(1 << (block.bits - 1))
    if block.zeros is not None:
        zeros = block.zeros.astype(np.float32)[:, at]
    return (block.codes.astype(np.float32) - zeros) * scales[:, at]


def put(model, name: str, form: str, block: Blocks, group: int | None = None) -> None:
    model.set_format(name, form, False, block.size if group is None else group)
    load_block(model, name, block)


def load_block(model, name: str, block: Blocks) -> None:
    model.load(
        name,
        block.bits,
        block.codes,
        block.scales,
        block.zeros,
        block.block_groups,
        None,
        block.steps,
        block.levels,
    )


def load_groups(model, weights, *_) -> str:
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            model.set_format(name, weight[0], False, weight[1].size)
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            load_block(model, name, weight[1])
        else:
            model.set(name, weight)
    return "groups"


def open_groups(shape, name_of, seed: int = 0, **options) -> NativeEngine:
    """An engine whose matrices are of the formats and groups that `name_of()` returns."""
    random = np.random.default_rng(seed)
    weights = weights_of(shape, lambda _: "Q8_0")
    for part, weight in weights.items():
        if isinstance(weight, Linear):
            name, group = name_of(part)
            group = min(group, -(-weight.shape[1] // 32))
            weights[part] = (name, integers(random, name, *weight.shape, group))
    weights["final_norm"] = outliers(random, shape.hidden_size)
    with mock.patch("paceline.engines.native.load_weights", load_groups):
        engine = NativeEngine(shape, weights, **options)
    engine._model.worth_waking = 0
    engine.head_values = dense(weights["embed"][1])
    return engine


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_every_value_is_that_of_the_file(name: str, isa: str) -> None:
    random = np.random.default_rng(0)
    shape = config(608, 256)
    for group in (1, 3, 4, 19):
        model = _native.NativeModel(shape, "fp32", "fp32", "fp32", isa, 2)
        block = integers(random, name, VOCAB, shape.hidden_size, group)
        assert block.fits(name)
        put(model, "embed", name, block)
        np.testing.assert_array_equal(model.get("embed"), dense(block))


@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_a_panel_holds_codes_and_scales_and_little_else(name: str) -> None:
    """Bits all told: a scale of 16 or 6 bits for a group, zero points of four bits or a byte."""
    bits = int(next(letter for letter in name if letter.isdigit()))
    assert name not in FORMATS + HEADS
    for inputs, blocks in ((576, 1), (896, 1), (896, 2), (4096, 4)):
        scale = 16 if name.startswith("group") else 6
        zero = (4 if bits <= 4 else 8) if name.endswith("zero") else 0
        expected = bits + (scale + zero) / (32 * blocks)
        assert expected <= _native.format_bits(name, inputs, blocks) < expected + 60 / inputs


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GROUP_FORMATS)
def test_products_differ_from_exact_ones_by_rounding(name: str, isa: str) -> None:
    """By that of activations, and of two fp32 sums for each block."""
    shape = config(608, 256)
    for group in (1, 4):
        engine = open_groups(shape, lambda _, group=group: (name, group), isa=isa, threads=2)
        check_products(
            engine, engine.head_values, (*range(1, 15), 24, 25, 40), shape.hidden_size / 16 * 20
        )
        check_head(in_bytes(engine, ["head"]), engine.head_values)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Whatever the formats, the tree, the chunks, the threads and the instruction set."""
    shape = config(data.draw(st.sampled_from((32, 288, 320))), 96, data.draw(st.booleans()))
    mixed, seed = data.draw(st.booleans()), data.draw(st.integers(0, 9))
    random = np.random.default_rng(seed)
    one = (data.draw(st.sampled_from(GROUP_FORMATS)), data.draw(st.sampled_from(GROUPS)))

    def name_of(_: str) -> tuple[str, int]:
        if not mixed:
            return one
        return str(random.choice(GROUP_FORMATS)), int(random.choice(GROUPS))

    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_groups(shape, name_of, seed, isa=isa, threads=threads)
    in_bytes(engine, data.draw(st.lists(st.sampled_from(KINDS), unique=True)))
    check_every_bit(engine, random, data)


@pytest.mark.parametrize("name", ["group3", "group4_zero", "nested3_zero", "levels4", "group8"])
def test_instruction_sets_agree_in_every_bit_where_sums_are_fused(name: str) -> None:
    ids = np.arange(40, dtype=np.int32) % 30
    engines = [open_groups(config(288, 96), lambda _: (name, 2), isa=isa) for isa in ISAS]
    for kinds in ([], KINDS):
        found = {engine.isa: run(in_bytes(engine, kinds), ids, 40) for engine in engines}
        plain = found.pop("portable")
        first = next(iter(found.values()))
        for other in found.values():
            np.testing.assert_array_equal(other, first)
        assert np.median(np.abs(first - plain)) <= 2e-2 * np.abs(plain).max()


def test_what_a_format_does_not_hold_is_refused() -> None:
    random, shape = np.random.default_rng(0), config(256, 256)

    def refuses(message: str, form: str, block: Blocks, group: int) -> None:
        model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
        with pytest.raises(ValueError, match=message):
            put(model, "embed", form, block, group)

    four = integers(random, "group4", VOCAB, 256, 2)
    refuses("cannot be kept as it is in group3", "group3", four, 2)
    refuses("cannot be kept as it is in nested4", "nested4", four, 2)
    refuses("has groups of other sizes than its format", "group4", four, 4)
    refuses("has groups of no inputs", "group4", four, 0)
    refuses("cannot have groups of its own in int4", "int4", four, 2)
    nested = integers(random, "nested4", VOCAB, 256, 2)
    refuses("cannot be kept as it is in int4", "int4", nested, 1)
    nested.steps[3, 1] = 64
    refuses("cannot be kept as it is in nested4", "nested4", nested, 2)
    four.scales[3, 1] = np.inf
    refuses("cannot be kept as it is in group4", "group4", four, 2)
    for name in GROUP_FORMATS:
        with pytest.raises(MethodError, match="holds only weights that a checkpoint stores so"):
            parse_format(name)
    model = _native.NativeModel(shape, "fp32", "fp32", "fp32", "", 1)
    model.set_format("embed", "group3")
    with pytest.raises(ValueError, match="cannot be rounded to group3"):
        model.set("embed", np.zeros((VOCAB, 256), np.float32))


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_formats_to_choose_hold_the_same_values_for_activations_of_8_bits(form, tiny_model) -> None:
    model = tiny_model("llama")
    weights = model.weights.to_arrays()
    first, second = (
        NativeEngine(model.config, weights, format=f"{form}{act}") for act in ("", ":act=int8")
    )
    assert second.format == {"int4": "int4:head=int8,act=int8", "int8": "int8:act=int8"}[form]
    for name in weights:
        if name.startswith("layers.") and weights[name].ndim == 2:
            np.testing.assert_array_equal(first.dense(name), second.dense(name))


def test_groups_of_all_sizes_are_kept_in_the_smallest_format(tiny_model) -> None:
    random = np.random.default_rng(0)
    for bits, zeros, kind, form in (
        (2, False, "F16", "group2"),
        (3, True, "BF16", "group3_zero"),
        (5, True, "F16", "group5_zero"),
        (7, False, "F16", "group8"),
    ):
        codes = random.integers(0, 1 << bits, (48, 288)).astype(np.uint8)
        scales = random.uniform(2.0**-9, 1, (48, 3))
        narrow = scales.astype(np.float16 if kind == "F16" else np.float32).astype(np.float32)
        if kind == "BF16":
            narrow = (narrow.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        points = random.integers(0, 1 << bits, (48, 3)).astype(np.uint16) if zeros else None
        matrix = Grouped(bits, codes, narrow, 128, points, scale_type=kind)
        block = Blocks.of(matrix)
        assert block is not None
        assert block.size == 4
        assert block.kept_in([*FORMATS, *GROUP_FORMATS]) == form
        np.testing.assert_array_equal(dense(block), matrix.dense())

"""Layouts of packed weights: read bit by bit as their makers define them, written back the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from paceline.errors import ModelError
from paceline.models import load
from paceline.models.formats import compressed_tensors
from paceline.models.formats.awq import AWQLayout
from paceline.models.formats.compressed_tensors import CompressedTensorsLayout
from paceline.models.formats.gptq import GPTQLayout
from paceline.models.formats.packed import Packed
from paceline.models.formats.quantized import read_packing
from paceline.models.formats.safetensors import _DTYPES, Stored
from paceline.models.tensors import Grouped, widen
from tests.conftest import shared
from tests.models.test_tensors import grouped

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = {"i": "I", "u": "BF", "f": "F"}


def stored(array: np.ndarray) -> Stored:
    return Stored(f"{NAMES[array.dtype.kind]}{8 * array.dtype.itemsize}", array)


def read_back(packing, parts, module="m."):
    tensors = packing.collect(
        "here", {module + name: stored(array) for name, array in parts.items()}
    )
    [(name, packed)] = tensors.items()
    assert name == "m.weight"
    assert isinstance(packed, Packed)
    matrix = packed.read()
    assert matrix.shape == packed.shape
    return matrix


def drawn(seed, rows, columns, bits, mode, group, order=False, top=None):
    """A matrix with float16 scales and zero points below `top`."""
    random = np.random.default_rng(seed)
    matrix = grouped(random, rows, columns, "F16", bits, mode, group, order)
    if matrix.zeros is None:
        return matrix
    zeros = random.integers(0, top or 1 << bits, matrix.zeros.shape).astype(np.uint16)
    return Grouped(bits, matrix.codes, matrix.scales, group, zeros, None, matrix.g_idx, "F16")


def same(one: Grouped, other: Grouped) -> None:
    np.testing.assert_array_equal(one.dense(), other.dense())
    np.testing.assert_array_equal(one.codes, other.codes)
    assert (one.bits, one.group, one.scale_type) == (other.bits, other.group, other.scale_type)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(["plain", "zeros"]),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.sampled_from([32, 48, None]),
    st.booleans(),
)
def test_gptq_is_read_as_defined_and_written_back(seed, bits, mode, version, group, order):
    rows, columns = 32, 96
    matrix = drawn(seed, rows, columns, bits, mode, group or columns, order)
    layout = GPTQLayout(bits, group, version)
    parts = layout.save(matrix)
    assert parts["qweight"].shape == (columns * bits // 32, rows)
    less = {"gptq": 1, "gptq_v2": 0}[version]
    for row in (0, 7, rows - 1):
        words = b"".join(
            int(word).to_bytes(4, "little", signed=True) for word in parts["qweight"][:, row]
        )
        whole = int.from_bytes(words, "little")
        codes = [whole >> bits * k & ((1 << bits) - 1) for k in range(columns)]
        assert codes == matrix.codes[row].tolist()
    for at in range(matrix.scales.shape[1]):
        words = b"".join(
            int(word).to_bytes(4, "little", signed=True) for word in parts["qzeros"][at]
        )
        whole = int.from_bytes(words, "little")
        zeros = [(whole >> bits * k) + less & ((1 << bits) - 1) for k in range(rows)]
        middle = np.full(rows, 1 << bits - 1)
        assert zeros == (middle if matrix.zeros is None else matrix.zeros[:, at]).tolist()
    again = read_back(layout, parts)
    same(again, matrix)
    for name, array in layout.save(again).items():
        np.testing.assert_array_equal(array, parts[name])


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(["plain", "zeros"]), st.sampled_from([16, 40, None])
)
def test_awq_is_read_as_defined_and_written_back(seed, mode, group):
    rows, columns = 24, 80
    matrix = drawn(seed, rows, columns, 4, mode, group or columns)
    layout = AWQLayout(group)
    parts = layout.save(matrix)
    outputs = [0, 2, 4, 6, 1, 3, 5, 7]
    for (k, word), bits in np.ndenumerate(parts["qweight"].view(np.uint32)):
        for place, output in enumerate(outputs):
            assert int(bits) >> 4 * place & 15 == matrix.codes[8 * word + output, k]
    if matrix.zeros is not None:
        for (at, word), bits in np.ndenumerate(parts["qzeros"].view(np.uint32)):
            for place, output in enumerate(outputs):
                assert int(bits) >> 4 * place & 15 == matrix.zeros[8 * word + output, at]
    again = read_back(layout, parts)
    same(again, matrix)
    for name, array in layout.save(again).items():
        np.testing.assert_array_equal(array, parts[name])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.sampled_from(["plain", "zeros"]),
    st.sampled_from([13, 26, 78]),
    st.booleans(),
)
def test_compressed_tensors_are_read_as_defined_and_written_back(seed, bits, mode, group, order):
    rows, columns = 11, 78
    matrix = drawn(seed, rows, columns, bits, mode, group, order)
    parts = {"weight" + name: part for name, part in compressed_tensors.save(matrix).items()}
    each = 32 // bits
    for (row, word), whole in np.ndenumerate(parts["weight_packed"].view(np.uint32)):
        codes = [int(whole) >> bits * k & ((1 << bits) - 1) for k in range(each)]
        expected = matrix.codes[row, each * word : each * (word + 1)].tolist()
        assert codes == expected + [0] * (each - len(expected))
    layout = CompressedTensorsLayout((bits,))
    again = read_back(layout, parts)
    same(again, matrix)
    for name, array in compressed_tensors.save(again).items():
        np.testing.assert_array_equal(array, parts["weight" + name])
    if matrix.zeros is not None:  # as older versions write them
        zeros = (matrix.zeros.astype(int) - (1 << bits - 1)).astype(np.int8)
        same(read_back(layout, {**parts, "weight_zero_point": zeros}), matrix)


def test_what_a_layout_cannot_hold_is_refused():
    matrix = drawn(1, 32, 64, 4, "zeros", 32)
    for save in (GPTQLayout(8, 32).save, GPTQLayout(4, 64).save, AWQLayout(64).save):
        with pytest.raises(ModelError, match="layout"):
            save(matrix)
    minima = drawn(1, 32, 64, 4, "minima", 32)
    for save in (GPTQLayout(4, 32).save, AWQLayout(32).save, compressed_tensors.save):
        with pytest.raises(ModelError, match=r"minima|this matrix is another"):
            save(minima)
    with pytest.raises(ModelError, match="whole words"):
        GPTQLayout(3, 32).save(drawn(1, 24, 64, 3, "zeros", 32))


SOUND = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "bits in quantization_config.* is 5, expected 2, 3, 4 or 8"),
        ({"bits": None}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format.*gptq or gptq_v2"),
        ({"is_marlin_format": True}, "checkpoint_format"),
        ({"pack_dtype": "int64"}, "pack_dtype.*int32"),
        ({"quant_method": "awq", "bits": 8}, "bits.*expected 4"),
        ({"quant_method": "awq", "version": "gemv"}, "version.*expected gemm"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point.*expected true"),
    ],
)
def test_settings_that_cannot_be_read_are_refused_by_name(settings, said):
    with pytest.raises(ModelError, match=said):
        read_packing({"quantization_config": SOUND | settings})


def test_settings_name_the_layout():
    assert read_packing({"quantization_config": SOUND}) == GPTQLayout(4, 32)
    assert read_packing({"quantization_config": SOUND | {"group_size": -1}}) == GPTQLayout(4, None)
    second = SOUND | {"checkpoint_format": "gptq_v2"}
    assert read_packing({"quantization_config": second}) == GPTQLayout(4, 32, "gptq_v2")
    awq = SOUND | {"quant_method": "awq", "version": "GEMM", "zero_point": True}
    assert read_packing({"quantization_config": awq}) == AWQLayout(32)
    assert read_packing({"quantization_config": SOUND | {"quant_method": "new"}}) is None
    assert read_packing({}) is None


def quantised(matrix: np.ndarray, group: int) -> Grouped:
    """Round to 4 bits by the smallest and largest value of a group, with float16 scales."""
    rows, columns = matrix.shape
    groups = matrix.reshape(rows, -1, group)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = np.maximum((high - low) / 15, 1e-6).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    codes = np.clip(np.rint(groups / scales[..., None]) + zeros[..., None], 0, 15)
    codes = codes.astype(np.uint8).reshape(rows, columns)
    return Grouped(4, codes, scales, group, zeros.astype(np.uint16), scale_type="F16")


def packed_checkpoint(folder: Path, method: str, group: int = 32) -> dict[str, Grouped]:
    """Write TinyStories-656K with packed linear maps; return them by module."""
    source = shared("models", "TinyStories-656K")
    for path in source.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, folder / path.name)
    layout = {
        "gptq": GPTQLayout(4, group),
        "gptq_v2": GPTQLayout(4, group, "gptq_v2"),
        "awq": AWQLayout(group),
    }
    tensors, made = {}, {}
    for name, array in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEAR):
            tensors[name] = array.astype(np.float16)
            continue
        matrix = quantised(array.astype(np.float32), group)
        made[module] = matrix
        if method == "compressed-tensors":
            parts = compressed_tensors.save(matrix)
            tensors |= {f"{module}.weight{part}": value for part, value in parts.items()}
        else:
            parts = layout[method].save(matrix)
            tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "gptq": SOUND | {"group_size": group},
        "gptq_v2": SOUND | {"group_size": group, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True},
        "compressed-tensors": compressed_tensors.scheme(4, group, symmetric=False),
    }[method]
    (folder / "config.json").write_text(json.dumps(settings))
    return made


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_a_packed_checkpoint_holds_its_matrices(method, tmp_path):
    made = packed_checkpoint(tmp_path, method)
    weights = load(tmp_path).weights
    assert weights.formats() == ("f16", "int4")
    names = {"q": "self_attn.q_proj", "down": "mlp.down_proj"}
    for name, module in names.items():
        matrix = weights[f"layers.1.{name}"]
        assert isinstance(matrix, Grouped)
        same(matrix, made[f"model.layers.1.{module}"])
    assert weights.stored("embed").dtype == "F16"


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("qzeros", None, "lacks its qzeros"),
        ("scales", None, "lacks its scales"),
        (
            "qzeros",
            np.zeros((4, 15), np.int32),
            r"qzeros of .* is I32 \[4, 15\], expected I32 \[4, 16\]",
        ),
        ("scales", np.zeros((4, 128), np.int32), "scales of .* is I32"),
        ("scales", np.full((4, 128), np.nan, np.float16), "NaN"),
        ("qweight", np.zeros((16, 128), np.int64), "expected I32"),
        ("qweight", np.zeros(16, np.int32), "expected two axes"),
        ("qweight", np.zeros((0, 128), np.int32), "expected two axes"),
        ("g_idx", np.full(128, 9, np.int32), "below the number of groups, 4"),
        ("g_idx", np.zeros(12, np.int32), r"g_idx of .* expected I32 \[128\]"),
    ],
)
def test_unsound_parts_are_refused(part, change, said, tmp_path):
    packed_checkpoint(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{part}"
    del tensors[name]
    if change is not None:
        tensors[name] = change
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        _ = load(tmp_path).weights["layers.0.q"]


def test_bfloat16_scales():
    scales = np.uint16([[0x3F80, 0x3FC0]])
    parts = {
        "qweight": np.zeros((4, 1), np.int32),
        "qzeros": np.zeros((2, 1), np.int32),
        "scales": np.repeat(scales.T, 8, 1),
    }
    matrix = read_back(AWQLayout(2), parts)
    assert matrix.scale_type == "BF16"
    np.testing.assert_array_equal(matrix.scales[0], widen(scales[0], "BF16"))


DTYPES = ("I32", "I64", "I8", "F32", "F16", "BF16", "U8")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_parts_of_any_type_and_shape_are_read_or_refused(data):
    """Sound parts, one or two of which are replaced by anything."""
    seed, bits = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([4, 8]))
    method = data.draw(st.sampled_from(["gptq", "awq", "compressed-tensors"]))
    bits = 4 if method == "awq" else bits
    matrix = drawn(seed, 32, 64, bits, "zeros", 32)
    if method == "compressed-tensors":
        layout = CompressedTensorsLayout((4, 8))
        saved = compressed_tensors.save(matrix)
        parts = {"m.weight" + name: stored(part) for name, part in saved.items()}
    else:
        layout = GPTQLayout(bits, 32) if method == "gptq" else AWQLayout(32)
        parts = {"m." + name: stored(part) for name, part in layout.save(matrix).items()}
    for name in data.draw(st.lists(st.sampled_from(sorted(parts)), max_size=2)):
        part = parts[name]
        dtype = data.draw(st.sampled_from((part.dtype,) * 3 + DTYPES))
        sizes = st.sampled_from([*part.shape, 0, 1, 3, 8, 32])
        shape = data.draw(st.one_of(st.just(part.shape), st.lists(sizes, max_size=3)))
        random = np.random.default_rng(data.draw(st.integers(0, 99)))
        width = np.dtype(_DTYPES[dtype]).itemsize
        raw = random.integers(0, 256, width * math.prod(shape)).astype(np.uint8)
        parts[name] = Stored(dtype, raw.view(_DTYPES[dtype]).reshape(shape))
    try:
        packed = layout.collect("here", parts)["m.weight"]
        assert isinstance(packed, Packed)
        read = packed.read()
    except ModelError:
        return
    assert read.shape == packed.shape
    assert np.isfinite(read.dense()).all()

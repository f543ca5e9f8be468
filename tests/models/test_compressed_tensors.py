"""Packed weights: read as their numbers say, the same when packed again, refused where unsound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from paceline.engines import open_engine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.formats.compressed_tensors import CompressedTensorsLayout, pack, scheme
from paceline.models.formats.packed import Packed
from paceline.models.formats.safetensors import Stored
from paceline.models.formats.writer import Pending, write_safetensors
from paceline.models.tensors import Grouped
from tests.conftest import shared

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


BITS = (4, 8)


def read(parts: dict[str, Any], bits: int) -> Grouped:
    kinds = {"_packed": "I32", "_scale": "BF16", "_shape": "I64"}
    tensors = {"weight" + name: Stored(kinds[name], part) for name, part in parts.items()}
    packed = CompressedTensorsLayout((bits,)).collect("here", tensors)["weight"]
    assert isinstance(packed, Packed)
    return packed.read()


def numbers(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Number i of a row is at its bit i * bits, counted from the lowest of the first word."""
    rows = [int.from_bytes(row.astype("<i4").tobytes(), "little") for row in packed]
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    return np.array([[(row >> bits * i & mask) - half for i in range(columns)] for row in rows])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(BITS),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([8, 32]),
)
def test_packed_values_are_numbers_times_scales(seed, bits, rows, groups, group):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, groups * group)).astype(np.float32)
    matrix *= random.choice(np.float32([0, 1e-3, 1, 50]), (rows, 1))
    parts = pack(matrix, bits, group)
    found = read(parts, bits)
    scales = np.repeat(found.scales, group, 1)
    whole = numbers(parts["_packed"], bits, matrix.shape[1])
    np.testing.assert_array_equal(found.dense(), (whole * scales).astype(np.float32))
    assert (np.abs(found.dense() - matrix) <= 0.51 * scales).all()
    again = pack(found.dense(), bits, group)
    assert all(np.array_equal(again[name], parts[name]) for name in parts)


def test_a_row_may_end_within_a_word_and_have_one_scale():
    whole = np.arange(-6, 7)
    row = sum((int(n) + 8) << 4 * i for i, n in enumerate(whole))
    words = np.frombuffer(row.to_bytes(8, "little"), np.int32).reshape(1, 2)
    parts = {"_packed": words, "_scale": np.uint16([[0x3F00]]), "_shape": np.array([1, 13])}
    np.testing.assert_array_equal(read(parts, 4).dense(), whole[None] / 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """TinyStories-656K with packed linear maps."""
    source, folder = shared("models", "TinyStories-656K"), tmp_path_factory.mktemp("packed")
    for path in source.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, folder / path.name)
    tensors: dict[str, Pending] = {}
    for name, array in load_file(source / "model.safetensors").items():
        wide = array.astype(np.float32)
        if not name.endswith(tuple(f"{each}.weight" for each in LINEAR)):
            tensors[name] = Pending(wide.shape, lambda wide=wide: wide)
            continue
        for suffix, part in pack(wide).items():
            dtype = {"_packed": "I32", "_scale": "F32", "_shape": "I64"}[suffix]
            if suffix == "_scale":
                part = (part.astype(np.uint32) << 16).view(np.float32)
            tensors[name + suffix] = Pending(part.shape, lambda part=part: part, dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = scheme()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def greedy(folder: Path, **options: Any) -> np.ndarray:
    model = load(folder)
    engine = open_engine(model, **options)
    prompt = np.array(model.tokenizer.encode("Once upon a time, there was a little"), np.int32)
    rows: list[np.ndarray] = []
    engine.start(prompt, lambda _, __, logits: rows.append(logits.copy()))
    return np.concatenate(rows)


def test_a_packed_checkpoint_is_the_model_in_int8(checkpoint):
    model = load(checkpoint)
    assert model.weights.formats() == ("f32", "int8")
    assert open_engine(model).format == "int8:head=fp32"
    exact = greedy(checkpoint, weight_format="fp32")
    np.testing.assert_allclose(greedy(checkpoint, name="reference"), exact, atol=1e-3, rtol=0)
    plain = greedy(shared("models", "TinyStories-656K"))
    assert 0 < np.abs(exact - plain).max() < 0.5
    # What was packed is kept: only the rounding of activations is left.
    np.testing.assert_allclose(greedy(checkpoint), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "int-quantized"}, "expected pack-quantized"),
        ({"config_groups": {}}, "expected pack-quantized"),
        ({"config_groups": {"a": {"weights": None}}}, "no weights in its group 'a'"),
        ({"num_bits": 9}, "num_bits.*or 7 or 8"),
        ({"num_bits": 3}, "no I32 for .* codes of 3 bits"),
        ({"num_bits": "8"}, "num_bits"),
        ({"num_bits": 4}, "packed as I32"),
        ({"type": "float"}, "type.*int"),
        ({"symmetric": False}, "lacks its _zero_point"),
        ({"input_activations": {"num_bits": 8}}, "quantises input_activations"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "--kv-format"),
        ({"quant_method": "gptq"}, "quantization_config"),
    ],
)
def test_other_packings_are_refused_by_name(checkpoint, tmp_path, change, said):
    settings = json.loads((checkpoint / "config.json").read_text())
    found = settings["quantization_config"]
    group = found["config_groups"]["group_0"]
    for key, value in change.items():
        at = group["weights"] if key in group["weights"] else found
        (group if key == "input_activations" else at)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for path in checkpoint.iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=said):
        load(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "change", "said"),
    [
        ("_scale", None, "lacks its _scale"),
        ("_shape", None, "lacks its _shape"),
        ("_shape", np.array([0, 128]), "weight_shape of two numbers"),
        ("_shape", np.array([128]), "weight_shape of two numbers"),
        ("_shape", np.array([2**62, 128]), "packed as I32"),
        ("_shape", np.array([128, 32]), "packed as I32"),
        ("_packed", np.zeros((128, 3), np.int32), "packed as I32"),
        ("_packed", np.zeros((128, 32), np.int64), "packed as I64"),
        ("_scale", np.zeros((128, 3), np.float32), "expected a row of them"),
        ("_scale", np.zeros((127, 4), np.float32), "expected a row of them"),
        ("_scale", np.zeros((128, 0), np.float32), "expected a row of them"),
        ("_scale", np.zeros((128, 4), np.int32), "expected a row of them"),
        ("_scale", np.full((128, 4), np.nan, np.float32), "NaN"),
        ("_zero_point", np.zeros((16, 4), np.int32), r"zero_point is I32 .*expected I32 \[32, 4\]"),
        ("_g_idx", np.full(128, 4, np.int32), "below the number of groups, 4"),
        ("_g_idx", np.zeros(127, np.int32), "g_idx is I32"),
        ("_zero_point", np.zeros((127, 4), np.int8), "zero_point is I8"),
    ],
)
def test_unsound_parts_are_refused(checkpoint, tmp_path, suffix, change, said):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight" + suffix
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    save_file(tensors, tmp_path / "model.safetensors")
    for path in checkpoint.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ModelError, match=said):
        open_engine(load(tmp_path))

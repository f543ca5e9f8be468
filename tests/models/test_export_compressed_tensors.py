"""Integers and 2:4 sparse matrices written as compressed-tensors stores them, and read again."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError, ModelError
from paceline.models import load
from paceline.models.export.compressed_tensors import CompressedTensorsExport
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats import gguf_writer
from paceline.models.formats.packed import Packed
from tests.conftest import shared

MODEL = "TinyStories-656K"
INTEGERS = "compressed-tensors:format=int-quantized"
PARTS = {  # of q, by what is written
    "compressed-tensors": {"weight_packed", "weight_scale", "weight_shape"},
    INTEGERS: {"weight", "weight_scale"},
}
FORMS = [
    ("rtn:bits=4,group=32", "compressed-tensors", "int4"),
    ("rtn:bits=4,group=32,symmetric=false", "compressed-tensors", "int4"),
    ("rtn:bits=8,group=0", "compressed-tensors", "int8"),
    ("rtn:bits=8,group=0", INTEGERS, "int8"),
    ("rtn:bits=8,group=64,symmetric=false", INTEGERS, "int8"),
    ("rtn:bits=3,group=64", "compressed-tensors", "int4"),
    ("rtn:bits=3,group=64,symmetric=false", "compressed-tensors", "int4"),
    ("rtn:bits=5,group=32", "compressed-tensors:dtype=f32", "int8"),
    ("rtn:bits=2,group=32", INTEGERS, "int8"),
    ("rtn:bits=4,group=32,symmetric=false,scale_bits=6", "compressed-tensors", "int4"),
    ("magnitude:pattern=2:4", "compressed-tensors", "2:4 sparse"),
]


def compressed(folder, spec, source=None):
    model = load(source or shared("models", MODEL))
    top = model.config.vocab_size
    texts = Calibration(np.random.default_rng(0).integers(0, top, (4, 24)), "noise")
    CompressionJob(model, folder, parse_recipe(spec)).run(texts)
    return load(folder)


def same(one, other):
    assert sorted(one.weights) == sorted(other.weights)
    for name in one.weights:
        np.testing.assert_array_equal(one.weights.dense(name), other.weights.dense(name), name)


@pytest.mark.parametrize(("spec", "form", "kind"), FORMS)
def test_what_is_written_is_read_again(tmp_path, spec, form, kind):
    source = compressed(tmp_path / "small", spec)
    export = CompressedTensorsExport(source, form)
    assert export.types == {kind: 14, "F32": 6}
    size = export.write(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert size == export.nbytes == sum(each.nbytes for each in tensors.values())
    found = load(tmp_path / "out")
    same(source, found)
    assert found.tokenizer.encode("Once upon a time") == source.tokenizer.encode("Once upon a time")
    module = "model.layers.0.self_attn.q_proj."
    names = {name.removeprefix(module) for name in tensors if name.startswith(module)}
    if kind == "2:4 sparse":
        assert names == {"compressed", "bitmask", "shape"}
        settings = json.loads((tmp_path / "out" / "config.json").read_text())
        assert settings["quantization_config"]["sparsity_config"]["sparsity_structure"] == "2:4"
    else:
        zeros = {"weight_zero_point"} if "symmetric=false" in spec else set()
        assert names == PARTS[form.replace(":dtype=f32", "")] | zeros


def test_sparse_matrices_lie_as_values_and_bits(tmp_path):
    source = compressed(tmp_path / "small", "magnitude:pattern=2:4")
    CompressedTensorsExport(source).write(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    module = "model.layers.1.mlp.down_proj."
    values, bits = tensors[f"{module}compressed"], tensors[f"{module}bitmask"]
    assert tensors[f"{module}shape"].tolist() == [[128], [384]]
    dense = np.zeros((128, 384), np.float32)
    for row in range(128):
        kept = iter(values[row])
        for column in range(384):
            if bits[row, column // 8] >> column % 8 & 1:
                dense[row, column] = next(kept)
    np.testing.assert_array_equal(dense, source.weights.dense("layers.1.down"))


def test_integers_are_codes_less_half_the_range(tmp_path):
    source = compressed(tmp_path / "small", "rtn:bits=8,group=64,symmetric=false")
    CompressedTensorsExport(source, INTEGERS).write(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    module = "model.layers.0.mlp.up_proj.weight"
    codes, zeros = (tensors[module + part].astype(np.float32) for part in ("", "_zero_point"))
    scales = np.repeat(tensors[f"{module}_scale"], 64, 1)
    expected = (codes - np.repeat(zeros, 64, 1)) * scales
    np.testing.assert_array_equal(expected, source.weights.dense("layers.0.up"))


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_fused_matrices_are_put_together(tmp_path, name):
    tiny.MODELS[name]().save_pretrained(tmp_path / "hf")
    source = compressed(tmp_path / "small", "rtn:bits=4,group=0", tmp_path / "hf")
    export = CompressedTensorsExport(source)
    export.write(tmp_path / "out")
    found = load(tmp_path / "out")
    same(source, found)
    reads = Counter()
    for key, tensor in found.weights._tensors.items():
        if isinstance(tensor, Packed):
            count = partial(counted, reads, key, tensor.read)
            found.weights._tensors[key] = replace(tensor, read=count)
    found.weights._last = None
    SafetensorsExport(found).write(tmp_path / "numbers")
    assert reads
    assert set(reads.values()) == {1}


def counted(reads, name, read):
    reads[name] += 1
    return read()


def test_matrices_may_have_different_bits(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'recipe = "rtn:bits=4,group=32"\n[[rule]]\nmatch = "*.v"\nrecipe = "rtn:bits=8,group=0"\n'
        '[[rule]]\nmatch = "layers.0.down"\nrecipe = "keep"\n'
    )
    source = compressed(tmp_path / "small", str(recipe))
    CompressedTensorsExport(source).write(tmp_path / "out")
    same(source, load(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = found["config_groups"].values()
    targets = {group["weights"]["num_bits"]: group["targets"] for group in groups}
    assert targets[8] == [f"model.layers.{index}.self_attn.v_proj" for index in (0, 1)]
    assert len(targets[4]) == 11
    assert set(found["ignore"]) == {"model.layers.0.mlp.down_proj", "lm_head"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("svd:keep=0.5", r"no place for layers.0.q \(.*low.*\): it takes integers"),
        ("magnitude:sparsity=0.5", r"layers.0.q \(a bitmap and its values\): .*two of every four"),
        ("rtn:bits=4,group=48", "groups have to divide the 128 inputs"),
        ("gguf:type=q4_0", r"layers.0.q \(blocks of Q4_0\)"),
        ("rtn:group=32,levels=learned,scale_bits=6", r"layers.0.q \(codes of a table of 16 levels"),
        ("quik", r"layers.0.q \(a matrix whose inputs are rounded\)"),
        ("comet:group=32", r"layers.0.q \(a matrix whose inputs are rounded\)"),
    ],
)
def test_forms_without_a_place_are_refused_by_name(tmp_path, spec, said):
    source = compressed(tmp_path / "small", spec)
    with pytest.raises(ModelError, match=said):
        CompressedTensorsExport(source)
    assert not (tmp_path / "out").exists()


def test_parts_of_one_tensor_need_one_form(tmp_path):
    tiny.MODELS["phi3"]().save_pretrained(tmp_path / "hf")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'recipe = "rtn:bits=4,group=0"\n[[rule]]\nmatch = "*.v"\nrecipe = "rtn:bits=8,group=0"\n'
    )
    source = compressed(tmp_path / "small", str(recipe), tmp_path / "hf")
    with pytest.raises(ModelError, match="in one tensor, and they have different forms"):
        CompressedTensorsExport(source)


def test_turned_matrices_are_refused(tmp_path):
    tiny.MODELS["gpt2"]().save_pretrained(tmp_path / "hf")
    source = compressed(tmp_path / "small", "rtn:bits=4,group=16", tmp_path / "hf")
    with pytest.raises(ModelError, match="turned round"):
        CompressedTensorsExport(source)


def test_a_model_of_numbers_is_refused():
    with pytest.raises(ModelError, match=r"holds no integers.*compress it first"):
        CompressedTensorsExport(load(shared("models", MODEL)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("compressed-tensors:bits=4", "unknown setting of compressed-tensors 'bits'"),
        ("compressed-tensors:format=marlin", "unknown format of compressed-tensors 'marlin'"),
        ("compressed-tensors:dtype=int8", "unknown dtype of compressed-tensors 'int8'"),
    ],
)
def test_wrong_settings_are_refused(text, said):
    with pytest.raises(MethodError, match=said):
        CompressedTensorsExport(load(shared("models", MODEL)), text)


def test_scales_are_rounded_to_the_type_that_was_asked_for(tmp_path):
    source = compressed(tmp_path / "small", "rtn:bits=4,group=32")
    export = CompressedTensorsExport(source, "compressed-tensors:dtype=bf16")
    assert "scales are rounded to BF16" in export.notes
    export.write(tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.weights.formats() == ("bf16", "int4")
    want = source.weights.dense("layers.0.q")
    np.testing.assert_allclose(found.weights.dense("layers.0.q"), want, rtol=2**-8)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = compressed(tmp_path / "small", "rtn:bits=4,group=32")
    export = CompressedTensorsExport(source)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ModelError, match="the disk has 0 MB left"):
            export.write(tmp_path / "out")
    full = OSError(28, "No space left on device")

    def fail(*_):
        raise full

    monkeypatch.setattr(export, "_parts", fail)
    with pytest.raises(ModelError, match="No space left"):
        export.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(tmp_path, spec, form, change):
    """Write a folder, change its tensors, and load it."""
    CompressedTensorsExport(compressed(tmp_path / "small", spec), form).write(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    found = load(tmp_path / "out")
    return [found.weights[name] for name in found.weights]


Q = "model.layers.0.self_attn.q_proj"
SPARSE = "magnitude:pattern=2:4"
EIGHT = "rtn:bits=8,group=64,symmetric=false"


@pytest.mark.parametrize(
    ("spec", "form", "change", "said"),
    [
        (EIGHT, INTEGERS, lambda t: t.pop(f"{Q}.weight_scale"), "stored as I8"),
        (
            *(EIGHT, INTEGERS),
            lambda t: t.update({f"{Q}.weight_zero_point": np.zeros((3, 2), np.int8)}),
            r"zero_point is I8 \[3, 2\], expected I8 \[128, 2\]",
        ),
        (
            *(EIGHT, INTEGERS),
            lambda t: t.update({f"{Q}.weight_scale": np.ones((128, 3), np.float32)}),
            "equal groups of the 128 inputs",
        ),
        (SPARSE, "compressed-tensors", lambda t: t.pop(f"{Q}.bitmask"), "lacks its bitmask"),
        (
            *(SPARSE, "compressed-tensors"),
            lambda t: t.update({f"{Q}.shape": np.array([[128], [127]])}),
            "no shape of two numbers, inputs in fours",
        ),
        (
            *(SPARSE, "compressed-tensors"),
            lambda t: t.update({f"{Q}.bitmask": np.full((128, 16), 7, np.uint8)}),
            "expected the|does not keep 2 of every 4",
        ),
    ],
)
def test_damaged_parts_are_refused(tmp_path, spec, form, change, said):
    with pytest.raises(ModelError, match=said):
        broken(tmp_path, spec, form, change)


@pytest.mark.parametrize(
    ("spec", "form", "kind"), [each for each in FORMS if "magn" not in each[0]]
)
def test_the_package_gives_the_same_values(tmp_path, spec, form, kind):
    reason = "compressed-tensors is not here; `pip install compressed-tensors`"
    package = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file as load_torch

    source = compressed(tmp_path / "small", spec)
    CompressedTensorsExport(source, form).write(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    reader = package.BaseCompressor.get_value_from_registry(settings["format"])
    tensors = load_torch(tmp_path / "out" / "model.safetensors")
    for ours, theirs in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        module = f"model.layers.1.{theirs}."
        parts = {
            name.removeprefix(module): each
            for name, each in tensors.items()
            if name.startswith(module)
        }
        assert set(parts) == set(reader.compression_param_names(scheme))
        values = reader.decompress(parts, scheme)["weight"].float().numpy()
        np.testing.assert_array_equal(values, source.weights.dense(f"layers.1.{ours}"))

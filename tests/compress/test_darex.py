"""Changes of a tuned model that are dropped and rescaled, and checkpoints of changes to a base."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.compress.calibrate import Calibration
from paceline.errors import MethodError, ModelError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats.base_checkpoint import Base, changes
from paceline.models.formats.safetensors import Stored
from paceline.models.formats.stored_forms import StoredForms
from paceline.models.tensors import Dense, narrow, to_dense
from tests.compress.test_structure import source, whole_model  # noqa: F401
from tests.compress.test_temp_lora import document, learn, nats

TYPES = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


@pytest.fixture(scope="module")
def parts(source):  # noqa: F811
    return document(source)


@pytest.fixture(scope="module")
def seen(parts):
    return Calibration(parts.tokens[:8], parts.origin)


@pytest.fixture(scope="module")
def tuned(source, seen, tmp_path_factory):  # noqa: F811
    """A model that has read a story, beside a copy of the one that has not."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(source.path, folder / "base")
    model, _ = learn(source, folder / "tuned", "temp_lora:rank=4,rate=0.002", seen)
    return model


def darex(tuned, out, seen, more):
    return learn(tuned, out, f"darex:base={tuned.path.parent / 'base'},{more}", seen)


def size(model):
    return (model.path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("factor", ["dare", "layers"])
def test_weights_are_those_of_the_base_or_rescaled_changes(source, tuned, seen, tmp_path, factor):  # noqa: F811
    model, [note] = darex(tuned, tmp_path / "out", seen, f"drop=0.75,factor={factor},rows=1")
    bounds = [
        float(each) for each in re.findall(r"by (\d+\.\d+)(?: to (\d+\.\d+))?:", note)[0] if each
    ]
    assert factor != "dare" or bounds == [4.0]
    for name in source.weights:
        old, new, made = (each.weights.dense(name) for each in (source, tuned, model))
        if old.ndim != 2 or not name.startswith("layers."):
            assert np.array_equal(made, new), name
            continue
        kept = made != old
        assert kept.mean() == pytest.approx(0.25, abs=0.05), name
        ratios = np.median((made - old)[kept] / (new - old)[kept])
        assert min(bounds) - 0.01 <= ratios <= max(bounds) + 0.01
        assert np.allclose((made - old)[kept], ratios * (new - old)[kept], atol=1e-6)


def test_a_searched_factor_is_nearer_to_the_tuned_model(tuned, seen, parts, tmp_path):
    losses, rest = {}, parts.tokens[8:]
    for name, more in {
        "dare": "drop=0.99,factor=dare",
        "search": "drop=0.99",
        "layers": "drop=0.99,factor=layers",
        "largest": "drop=0.97,choose=largest",
    }.items():
        model, [note] = darex(tuned, tmp_path / name, seen, more)
        losses[name] = nats(model, rest)
        assert size(model) < size(tuned) / 15
        near, plain, base = map(float, re.findall(r"(\d+\.\d{4})", note))
        assert near == plain if name == "dare" else near < min(plain, base)
    base = nats(load(tuned.path.parent / "base"), rest)
    assert losses["search"] < losses["dare"] - 0.3
    assert losses["layers"] < losses["dare"] - 0.3
    assert losses["search"] < base - 0.3
    assert losses["largest"] < nats(tuned, rest) + 0.4


def test_changes_to_what_methods_before_left(source, seen, tmp_path):  # noqa: F811
    recipe = "temp_lora:rank=2,rate=0.002+darex:drop=0.9,rows=1"
    model, _ = learn(source, tmp_path / "out", recipe, seen)
    assert size(model) < source.weights.nbytes() / 4
    outs = []
    for options in ({"threads": 1}, {"engine": "reference"}):
        with LM(model.path, **options) as lm:
            outs.append(lm.generate("Zog the robot", max_new_tokens=30, temperature=0).tokens)
    assert list(outs[0]) == list(outs[1])


def test_compressed_further_it_is_whole(tuned, seen, tmp_path):
    base = tuned.path.parent / "base"
    recipe = f"darex:base={base},drop=0.5,rows=1+rtn:bits=8,group=32"
    model, _ = learn(tuned, tmp_path / "out", recipe, seen)
    assert "base" not in json.loads((model.path / "config.json").read_text())["quantization_config"]


def test_a_checkpoint_of_changes_is_written_whole_by_convert(tuned, seen, tmp_path):
    model, _ = darex(tuned, tmp_path / "out", seen, "rows=1")
    SafetensorsExport(model, "fp32").write(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    whole = load(tmp_path / "whole")
    for name in whole.weights:
        assert np.isfinite(whole.weights.dense(name)).all()


def test_the_base_is_found_beside_and_checked(tuned, seen, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(tuned.path.parent, home)
    first = load(home / "tuned")
    model, _ = darex(first, home / "out", seen, "rows=1")
    right = {name: model.weights.dense(name).copy() for name in model.weights}
    moved = tmp_path / "moved"
    home.rename(moved)
    again = load(moved / "out")
    assert all(np.array_equal(again.weights.dense(name), right[name]) for name in right)
    settings = moved / "base" / "config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(ModelError, match="is another checkpoint now"):
        load(moved / "out")
    shutil.rmtree(moved / "base")
    with pytest.raises(ModelError, match=r"which is not there; put base beside it"):
        load(moved / "out")


def test_changes_are_no_base(tuned, seen, tmp_path):
    model, _ = darex(tuned, tmp_path / "out", seen, "rows=1")
    with pytest.raises(ModelError, match="can be no base itself"):
        learn(tuned, tmp_path / "again", f"darex:base={model.path}", seen)
    config = json.loads((model.path / "config.json").read_text())
    config["quantization_config"]["base"]["path"] = str(model.path)
    (model.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="which holds changes itself"):
        load(model.path)


@pytest.mark.parametrize("entry", [3, {}, {"path": "x"}, {"path": "", "fingerprint": "y"}, []])
def test_a_base_that_is_none_is_refused(tuned, seen, tmp_path, entry):
    model, _ = darex(tuned, tmp_path / "out", seen, "rows=1,factor=dare")
    config = json.loads((model.path / "config.json").read_text())
    config["quantization_config"]["base"] = entry
    (model.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="expected its path and its fingerprint"):
        load(model.path)


def test_models_without_changes_are_refused(source, tuned, seen, tmp_path):  # noqa: F811
    base = tuned.path.parent / "base"
    with pytest.raises(MethodError, match="no matrix differs"):
        learn(source, tmp_path / "same", f"darex:base={base}", seen)
    with pytest.raises(MethodError, match="no matrix differs from the model before"):
        learn(source, tmp_path / "none", "darex", seen)
    with pytest.raises(MethodError, match="has 5 layers and this one 4"):
        learn(source, tmp_path / "few", "layer_drop:count=1,by=last+darex", seen)
    with pytest.raises(MethodError, match="layer 0 has other tensors"):
        learn(source, tmp_path / "thin", "flap:share=0.3,multiple=4+darex", seen)
    with pytest.raises(MethodError, match="expected search, layers, dare"):
        learn(source, tmp_path / "word", "darex:factor=best", seen)
    with pytest.raises(MethodError, match="take factor=search"):
        learn(source, tmp_path / "word", "darex:factor=dare,choose=largest", seen)


class Held(dict):
    """Weights of a base."""

    def stored(self, name):
        return self[name]

    def shape(self, name):
        return self[name].shape

    def float_type(self, name):
        return self[name].dtype


@given(
    st.sampled_from(list(TYPES)),
    st.integers(1, 5),
    st.integers(1, 70),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_changes_come_back_to_the_bit(kind, rows, columns, share, seed):
    draws = np.random.default_rng(seed)
    old = draws.standard_normal((rows, columns)).astype(np.float32)
    new = np.where(draws.random(old.shape) < share, draws.standard_normal(old.shape), old)
    one, other = (
        np.frombuffer((np.float32(each).view(np.uint32) & 0xFFFF0000).tobytes(), np.float32)
        .reshape(old.shape)
        .copy()
        if kind == "BF16"
        else each.astype(np.float16 if kind == "F16" else np.float32).astype(np.float32)
        for each in (old, new)
    )
    other[draws.random(old.shape) < 0.1] = -0.0
    base = Held(
        {name: Dense(narrow(one, kind), kind) for name in ("layers.0.q", "layers.0.k", "embed")}
    )
    arrays = {
        "layers.0.q": (kind, narrow(other, kind)),
        "layers.0.k": (kind, base["layers.0.k"].values),
        "layers.0.attn_norm": ("F32", np.ones(3, np.float32)),
    }
    stored = {
        name: Stored(dtype, values) for name, (dtype, values) in changes(arrays, base).items()
    }
    assert "layers.0.k" not in stored
    assert "layers.0.attn_norm" in stored
    layout = StoredForms(Base("base", "mark").with_weights(base))
    read = layout.collect("folder", stored)
    for name in ("layers.0.q", "layers.0.k", "embed"):
        each = read[name]
        matrix = Dense(each.values, each.dtype) if isinstance(each, Stored) else each.read()
        right = other if name == "layers.0.q" else one
        assert matrix.dtype == kind
        assert np.array_equal(to_dense(matrix).view(np.uint32), right.view(np.uint32)), name


def test_changes_of_another_matrix_are_refused():
    base = Held({"layers.0.q": Dense(np.zeros((20, 30), np.float32))})
    arrays = {"layers.0.q": ("F32", np.eye(20, 30, dtype=np.float32))}
    kept = changes(arrays, base)
    stored = {name: Stored(dtype, values) for name, (dtype, values) in kept.items()}
    other = Held({"layers.0.q": Dense(np.zeros((30, 20), np.float32))})
    assert any(":" in name for name in stored)
    for weights in (other, Held()):
        layout = StoredForms(Base("base", "mark").with_weights(weights))
        with pytest.raises(ModelError, match="changes to a matrix that base does not have"):
            layout.collect("folder", stored)

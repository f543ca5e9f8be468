"""Layers that see a window and sinks: which they are, how both engines run them, and recovery."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.compress.structure.longgen import LongGen
from paceline.core import TokenTree
from paceline.engines.native import NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import parse_gguf_format
from paceline.models.export.safetensors import SafetensorsExport
from tests.compress.test_structure import (  # noqa: F401
    changed,
    compress,
    loss,
    settings,
    source,
    texts,
    whole_model,
)


def near(model) -> dict[int, tuple[int, int]]:
    """Return window and sinks of the layers that have them."""
    layers = enumerate(model.config.layers)
    return {i: (each.window, each.sinks) for i, each in layers if each.window is not None}


@pytest.mark.parametrize(
    ("by", "full", "seeing"),
    [("even", 0.4, {1, 4}), ("middle", 0.2, {2}), ("middle", 0.6, {1, 2, 3}), ("even", 0, set())],
)
def test_a_share_of_the_layers_sees_everything(source, tmp_path, by, full, seeing):  # noqa: F811
    recipe = f"longgen:window=8,sinks=2,by={by},full={full}"
    model, [note] = compress(source, tmp_path / "out", recipe)
    assert near(model) == dict.fromkeys(set(range(5)) - seeing, (8, 2))
    assert "2 first and 8 last positions" in note
    entries = settings(tmp_path / "out")["layer_shapes"]
    assert [set(entry) > {"window", "sinks"} for entry in entries] == [
        index not in seeing for index in range(5)
    ]


def test_layers_whose_attention_says_nothing_get_windows_for_nothing(source, tmp_path):  # noqa: F811
    def silence(tensors):
        for layer in (1, 3):
            tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][:] = 0

    idle = changed(source, tmp_path / "idle", silence)
    recipe = "longgen:window=4,sinks=0,by=loss,full=0.6"
    model, [note] = compress(idle, tmp_path / "out", recipe)
    assert set(near(model)) == {1, 3}
    assert "a divergence of 0.0000" in note
    assert loss(idle, model) < 1e-5


def test_sinks_are_worth_much(source, tmp_path):  # noqa: F811
    lost = {}
    for sinks in (0, 2):
        recipe = f"longgen:window=10,sinks={sinks},full=0.2"
        lost[sinks] = loss(source, compress(source, tmp_path / str(sinks), recipe)[0])
    assert 0 < lost[2] < 0.5 * lost[0]


def test_recovery_comes_closer(source, tmp_path):  # noqa: F811
    recipe = "longgen:window=6,sinks=1,full=0.2"
    before, _ = compress(source, tmp_path / "before", recipe)
    after, notes = compress(source, tmp_path / "after", f"{recipe}+recover:tokens=4000,rank=4")
    assert near(after) == near(before)
    assert loss(source, after) < 0.8 * loss(source, before)
    assert notes[1].startswith("recover trained lora")


def test_later_steps_and_later_jobs_keep_windows(source, tmp_path):  # noqa: F811
    recipe = "layer_drop:count=1,by=last+longgen:window=8,full=0.5"
    model, _ = compress(source, tmp_path / "one", f"{recipe}+attention_drop:count=1,by=last")
    assert near(model) == {0: (8, 4), 2: (8, 4)}
    assert [layer.heads for layer in model.config.layers] == [8, 8, 8, 0]
    again, _ = compress(model, tmp_path / "two", "layer_drop:count=1,by=last+rtn:bits=8,group=32")
    assert near(again) == near(model)
    assert len(again.config.layers) == 3


def sees(layer, distance: int, position: int) -> bool:
    return distance < layer.window or position < layer.sinks


@pytest.mark.parametrize("sinks", [0, 2])
def test_engines_see_what_is_said(source, tmp_path, sinks):  # noqa: F811
    """A changed token changes the next one's state exactly where some path of layers leads."""
    model, _ = compress(source, tmp_path / "out", f"longgen:window=4,sinks={sinks},full=0")
    layer = model.config.layers[0]
    text = np.array(texts(source).tokens[0][:20], np.int32)
    shallow = replace(model.config, layers=(layer,))
    weights = {
        name: model.weights.dense(name)
        for name in model.weights
        if not name.startswith(("layers.1", "layers.2", "layers.3", "layers.4"))
    }
    for engine in (ReferenceEngine(shallow, weights), NativeEngine(shallow, weights, threads=1)):
        rows = []
        for changed_at in (None, *range(19)):
            ids = text.copy()
            if changed_at is not None:
                ids[changed_at] = 300
            sequence = engine.start(ids[:19])
            rows.append(engine.forward([(sequence, TokenTree.root(int(ids[19])))])[0].copy())
        for at in range(19):
            same = np.array_equal(rows[0], rows[1 + at])
            assert same != sees(layer, 19 - at, at), (engine.name, at)


@pytest.mark.parametrize("sinks", [0, 3])
def test_drafts_change_no_token_behind_windows(source, tmp_path, sinks):  # noqa: F811
    compress(source, tmp_path / "out", f"longgen:window=12,sinks={sinks},full=0.4")
    told = []
    for drafter in ("plain", "blend", "hostile"):
        with LM(tmp_path / "out", drafter=drafter, budget=12) as lm:
            prompts = ["Once upon a time", "Tom had a dog. " * 12]
            outputs = lm.generate(prompts, max_new_tokens=50, temperature=0.8, seed=3)
            told.append([output.tokens for output in outputs])
    assert told[0] == told[1] == told[2]


def test_other_programs_know_no_sinks(source, tmp_path):  # noqa: F811
    model, _ = compress(source, tmp_path / "out", "longgen:window=8,full=0")
    with pytest.raises(ModelError, match="one shape"):
        SafetensorsExport(model)
    with pytest.raises(ModelError, match="attention windows of its layers would be lost"):
        GGUFExport(model, parse_gguf_format("f32"))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("longgen:window=64", "texts of calibration have 40 tokens, and a window of 64"),
        ("longgen:window=8,full=0.95", "leaves all of the 5 layers"),
        ("longgen:full=1", "full is 1.0, expected 0 to 0.999"),
        ("longgen:by=random", "expected even, middle, loss"),
        ("longgen:window=0", "window is 0"),
    ],
)
def test_windows_that_cannot_be_are_refused(source, tmp_path, recipe, words):  # noqa: F811
    with pytest.raises(MethodError, match=words):
        compress(source, tmp_path / "out", recipe)


BAD = (
    (lambda entry: entry.pop("sinks"), "expected null or an object with heads"),
    (lambda entry: entry.update(window=0), "window in layer_shapes.0. of config.json is 0"),
    (
        lambda entry: entry.update(window=None),
        "window in layer_shapes.0. of config.json is missing",
    ),
    (lambda entry: entry.update(sinks=-1), "sinks in layer_shapes.0. of config.json is -1"),
)


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_windows_in_settings_are_read_strictly(source, tmp_path, damage, words):  # noqa: F811
    compress(source, tmp_path / "out", "longgen:window=8,full=0")
    values = settings(tmp_path / "out")
    damage(values["layer_shapes"][0])
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=words):
        load(tmp_path / "out")


def test_a_tree_with_one_pass_is_a_chain_of_passes(source):  # noqa: F811
    method = LongGen(window=5, sinks=3)
    layers = tuple(method.near(layer) for layer in source.config.layers)
    engine = ReferenceEngine(replace(source.config, layers=layers), source.weights)
    ids = np.array(texts(source).tokens[0], np.int32)
    plain = engine.start(ids[:10], chunk=1)
    tree = engine.forward([(plain, TokenTree.chain(ids[10:30]))])
    whole = engine.forward([(engine.open(), TokenTree.chain(ids[:30]))])
    np.testing.assert_allclose(tree, whole[10:], atol=1e-4)
    model = whole_model(source)
    windowed = replace(model, config=engine.config)
    x = windowed.embed(model.texts[:1])
    for index in range(5):
        x = windowed.run(index, x)
    expected = torch.from_numpy(whole)
    torch.testing.assert_close(model.logits(x[0])[:30], expected, atol=1e-4, rtol=0)

"""Methods that leave parts of a model out, and the training that brings the rest back."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.reconstruct.recovery import Recovery
from paceline.compress.structure.base import StructureMethod
from paceline.compress.structure.widths.moments import Moments
from paceline.compress.structure.widths.removal import damped, refit, removal
from paceline.compress.whole_model import WholeModel
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import parse_gguf_format
from paceline.models.export.safetensors import SafetensorsExport
from paceline.registry import structures
from tests.conftest import shared


def texts(model, rows=6, length=40):
    story = "Once upon a time there was a little girl named Lily. She liked to play outside. " * 20
    tokens = np.array(model.tokenizer.encode(story)[: rows * length], np.int64)
    return Calibration(tokens.reshape(rows, length), "a story")


@pytest.fixture(scope="module")
def source():
    torch.set_num_threads(1)
    return load(shared("models", "stories260K"))


def compress(model, out, recipe):
    job = CompressionJob(model, out, parse_recipe(recipe))
    job.run(texts(model))
    return load(out), job.notes


def changed(source, folder, change):
    """Return a copy of a checkpoint whose tensors `change` has rewritten."""
    folder.mkdir()
    for file in source.path.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: np.array(each) for name, each in load_file(source.path / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return load(folder)


def settings(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("by", ["loss", "cosine"])
def test_layers_that_do_nothing_go_first_and_cost_nothing(source, tmp_path, by):
    def silence(tensors):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.3.{name}.weight"][:] = 0

    idle = changed(source, tmp_path / "idle", silence)
    model, notes = compress(idle, tmp_path / "out", f"layer_drop:count=1,by={by}")
    assert notes == ["layer_drop removed the layers 3 of 5 layers."]
    assert settings(tmp_path / "out")["layer_shapes"][3] is None
    with LM(idle.path, threads=1) as one, LM(model.path, threads=1) as other:
        told = [lm.generate("Once", max_new_tokens=40, temperature=0).text for lm in (one, other)]
    assert told[0] == told[1]


def test_attention_that_does_nothing_goes_first(source, tmp_path):
    def silence(tensors):
        tensors["model.layers.2.self_attn.o_proj.weight"][:] = 0

    idle = changed(source, tmp_path / "idle", silence)
    for by in ("loss", "cosine"):
        model, notes = compress(idle, tmp_path / by, f"attention_drop:count=1,by={by}")
        assert notes == ["attention_drop removed the attentions 2 of 5 layers."]
        assert [layer.kv_heads for layer in model.config.layers] == [4, 4, 0, 4, 4]
        assert not any(name.startswith("layers.2.") and "attn" in name for name in model.weights)
    model, _ = compress(idle, tmp_path / "last", "attention_drop:count=2,by=last")
    assert [layer.kv_heads for layer in model.config.layers] == [4, 4, 4, 0, 0]


def test_removal_costs_what_the_best_fit_loses():
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 6)
    w, g = torch.randn(5, 6), torch.eye(5)
    moment = x.T @ x / len(x)
    made = removal(w, moment, g, 2, 2)
    clean = damped(moment)
    gone: list[int] = []
    for step, unit in enumerate(made.order.tolist(), 1):
        gone.append(unit)
        kept = [i for i in range(6) if i // 2 not in gone]
        fitted = refit(w.double() @ clean[:, kept], moment[kept][:, kept]).double()
        lost = w.double().clone()
        lost[:, kept] -= fitted
        cost = float((lost @ clean * lost).sum())
        assert made.costs[step] == pytest.approx(cost, rel=1e-2)
    singles = []
    for unit in range(3):
        kept = [i for i in range(6) if i // 2 != unit]
        lost = w.double().clone()
        lost[:, kept] -= torch.linalg.solve(clean[kept][:, kept], (w.double() @ clean[:, kept]).T).T
        singles.append(float((lost @ clean * lost).sum()))
    assert int(np.argmin(singles)) == made.order[0]
    assert made.costs[1] == pytest.approx(min(singles), rel=1e-6)


def test_narrow_removes_copies_of_channels_for_nothing(source, tmp_path):
    def double(tensors):  # half of the channels of each MLP say what the others say
        for index in range(5):
            mlp = f"model.layers.{index}.mlp."
            for name in ("gate_proj", "up_proj"):
                rows = tensors[f"{mlp}{name}.weight"]
                rows[86:] = rows[:86]

    twins = changed(source, tmp_path / "twins", double)
    model, _ = compress(twins, tmp_path / "out", "narrow:share=0.3,multiple=2,heads=false,rows=1")
    assert all(layer.intermediate >= 86 for layer in model.config.layers)
    assert all(layer.kv_heads == 4 for layer in model.config.layers)
    weights = sum(np.prod(model.weights.shape(n)) for n in model.weights if n.startswith("layers."))
    whole = sum(np.prod(twins.weights.shape(n)) for n in twins.weights if n.startswith("layers."))
    assert weights == pytest.approx(0.7 * whole, rel=0.02)
    assert loss(twins, model) < 2e-3


def loss(one, other):
    """Return the mean divergence of two models on a text, in nats."""
    rows = []
    for model in (one, other):
        found = []
        ReferenceEngine(model.config, model.weights).start(
            np.array(texts(model).tokens[0], np.int32),
            lambda _, __, made, found=found: found.append(made),
        )
        rows.append(torch.from_numpy(np.concatenate(found)).log_softmax(-1))
    right, ours = rows
    return float((right.exp() * (right - ours)).sum(-1).mean())


def test_refitted_widths_lose_less_than_means_and_both_less_than_nothing(source, tmp_path):
    losses = {}
    for recipe in ("narrow:share=0.2,multiple=4,rows=2", "flap:share=0.2,multiple=4"):
        model, _ = compress(source, tmp_path / recipe[:4], recipe)
        losses[recipe[:4]] = loss(source, model)
    assert 0 < losses["narr"] < losses["flap"] < 1


def whole_model(source):
    tensors = {name: torch.tensor(source.weights.dense(name)) for name in source.weights}

    def layer(index):
        prefix = f"layers.{index}."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    outer = {name: each for name, each in tensors.items() if not name.startswith("layers.")}
    return WholeModel(source.config, layer, outer, torch.from_numpy(texts(source).tokens))


def test_flap_puts_the_mean_of_what_it_removes_into_the_bias(source, tmp_path):
    model, moments = whole_model(source), Moments(diagonal=True)
    model.run(0, model.embed(model.texts), moments.tap())
    made = structures.parse("flap:share=0.3,multiple=4").restructure(model, model, tmp_path)
    tensors, old = made.layers[0].tensors, model.layer(0)
    for name in ("o", "down"):
        new = tensors[name]
        kept = [int((old[name] == column[:, None]).all(0).nonzero()[0]) for column in new.T]
        mean = moments.mean(name).float()
        assert 0 < len(kept) < len(mean) or name == "o"
        torch.testing.assert_close(new @ mean[kept] + tensors[f"{name}.bias"], old[name] @ mean)


def test_recovery_that_is_interrupted_ends_as_if_it_were_not(source, tmp_path, monkeypatch):
    recipe = "layer_drop:count=1,by=cosine+recover:tokens=1600,rank=2"
    whole, notes = compress(source, tmp_path / "whole", recipe)
    assert "recover trained lora on 1600 tokens" in notes[1]
    steps = []
    backwards = Recovery._backwards

    class Stopped(BaseException):
        pass

    def stop(self, rows):
        steps.append(rows)
        if len(steps) == 12:
            raise Stopped
        return backwards(self, rows)

    monkeypatch.setattr(Recovery, "_backwards", stop)
    monkeypatch.setattr("paceline.compress.reconstruct.recovery._KEPT", 0.0)
    with pytest.raises(Stopped):
        compress(source, tmp_path / "again", recipe)
    again, _ = compress(source, tmp_path / "again", recipe)
    assert len(steps) == 12 + 20 - 11
    for name in whole.weights:
        assert np.array_equal(whole.weights.dense(name), again.weights.dense(name)), name


@pytest.mark.parametrize("parameters", ["norms", "lora", "all"])
def test_recovery_trains_what_it_says_and_comes_closer(source, tmp_path, parameters):
    before, _ = compress(source, tmp_path / "before", "layer_drop:count=1,by=cosine")
    recipe = f"layer_drop:count=1,by=cosine+recover:tokens=1200,rank=2,parameters={parameters}"
    after, _ = compress(source, tmp_path / "after", recipe)
    assert loss(source, after) < 0.9 * loss(source, before)
    moved = {
        name.rpartition(".")[2]
        for name in after.weights
        if not np.array_equal(before.weights.dense(name), after.weights.dense(name))
    }
    norms = {"attn_norm", "mlp_norm"}
    matrices = {"q", "k", "v", "o", "gate", "up", "down"}
    assert moved == (norms if parameters == "norms" else norms | matrices)


def test_recovery_that_does_not_help_changes_nothing(source, tmp_path):
    before, _ = compress(source, tmp_path / "before", "layer_drop:count=1,by=cosine")
    recipe = "layer_drop:count=1,by=cosine+recover:tokens=240,parameters=all,rate=1"
    after, notes = compress(source, tmp_path / "after", recipe)
    assert "and all is as it was" in notes[1]
    for name in before.weights:
        assert np.array_equal(before.weights.dense(name), after.weights.dense(name))


def test_parts_are_removed_of_what_was_left_before(source, tmp_path):
    compress(source, tmp_path / "one", "layer_drop:count=1,by=last")
    job = CompressionJob(
        load(tmp_path / "one"),
        tmp_path / "two",
        parse_recipe("attention_drop:count=1,by=last"),
        True,
    )
    job.run(texts(source))
    entries = settings(tmp_path / "two")["layer_shapes"]
    assert [entry and entry["heads"] for entry in entries] == [8, 8, 8, 0, None]
    together, _ = compress(
        source, tmp_path / "both", "layer_drop:count=1,by=last+attention_drop:count=1,by=last"
    )
    two = load(tmp_path / "two")
    assert two.config == together.config
    for name in two.weights:
        assert np.array_equal(two.weights.dense(name), together.weights.dense(name))


@pytest.mark.parametrize(
    "rest",
    [
        "awq+rtn:bits=4,group=32",
        "teq:steps=2+rtn:bits=4,group=32",
        "flatquant:steps=2+rtn:bits=4,group=32",
        "mobilequant:steps=2+rtn:bits=8,group=32",
        "magnitude:pattern=2:4",
        "squeezellm:bits=3",
        "rtn:bits=3,group=32+eora:rank=2",
        "rtn:bits=3,group=32+block_ap:steps=2",
        "rtn:bits=3,group=32+llm_qat:steps=2",
    ],
)
def test_whatever_follows_works_on_layers_that_lack_parts(source, tmp_path, rest, monkeypatch):
    # One layer loses its attention; the MLP of another goes by hand, as no method does that.
    class Without(StructureMethod):
        def restructure(self, model, base, folder):
            made = structures.parse("attention_drop:count=1,by=last").restructure(
                model, base, folder
            )
            layers = list(made.layers)
            layers[0] = replace(layers[0], shape=replace(layers[0].shape, intermediate=0))
            return replace(made, layers=layers)

    recipe = parse_recipe(f"attention_drop:count=1+{rest}")
    steps = replace(recipe.steps, structures=(Without(),))
    job = CompressionJob(source, tmp_path / "out", replace(recipe, steps=steps))
    job.run(texts(source))
    with LM(tmp_path / "out") as lm:
        assert lm.generate("Once", max_new_tokens=4, temperature=0).text


REFUSED = (
    ("layer_drop:count=5", "expected fewer than the 5 layers"),
    ("attention_drop:count=5", "expected fewer than the 5 attentions"),
    ("narrow:share=0.9,heads=false", "more than all MLP channels"),
)


@pytest.mark.parametrize(("recipe", "words"), REFUSED)
def test_removals_that_leave_nothing_are_refused(source, tmp_path, recipe, words):
    with pytest.raises(MethodError, match=words):
        compress(source, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("rtn:bits=4+layer_drop", "the order is structures"),
        ("layer_drop+awq", "compresses nothing"),
        ("layer_drop:by=luck", "expected cosine, loss, last"),
        ("recover:parameters=biases", "expected norms, lora, all"),
        ("recover:dtype=int8", "expected fp32 or bf16"),
        ("narrow:share=0", "expected 0.01 to 0.9"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, words):
    with pytest.raises(MethodError, match=words):
        parse_recipe(recipe)


def test_rules_and_heads_take_no_structure(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('recipe = "keep"\n[[rule]]\nmatch = "layers.0.*"\nrecipe = "layer_drop"\n')
    with pytest.raises(MethodError, match="changes more than matrices"):
        parse_recipe(str(file))
    with pytest.raises(MethodError, match="needs calibration"):
        parse_recipe("rtn:bits=8", "layer_drop")


BAD = (
    (lambda s: s["layer_shapes"].pop(), "an entry for each of 5 layers"),
    (lambda s: s.update(layer_shapes="none"), "an entry for each of 5 layers"),
    (lambda s: s.update(layer_shapes=[None] * 5), "at least one layer"),
    (lambda s: s["layer_shapes"].__setitem__(1, [8, 4, 172]), "expected null or an object"),
    (lambda s: s["layer_shapes"][1].pop("heads"), "expected null or an object"),
    (lambda s: s["layer_shapes"][1].update(window=3), "expected null or an object"),
    (
        lambda s: s["layer_shapes"][1].update(heads=16),
        "heads in layer_shapes.1. of config.json is 16",
    ),
    (
        lambda s: s["layer_shapes"][1].update(heads=-1),
        "heads in layer_shapes.1. of config.json is -1",
    ),
    (lambda s: s["layer_shapes"][1].update(intermediate=True), "is True, expected a whole number"),
    (lambda s: s["layer_shapes"][1].update(kv_heads=3), "kv_heads is 3, expected a divisor"),
    (lambda s: s["layer_shapes"][1].update(kv_heads=0), "kv_heads is 0, expected a divisor"),
    (
        lambda s: s["layer_shapes"][1].update(heads=0, kv_heads=0, intermediate=0),
        "expected null for no layer",
    ),
    (lambda s: s["layer_shapes"][0].update(intermediate=100), "layers.0.(gate|up|down)"),
    (lambda s: s.update(added_biases=["q"]), "expected a list of o and down"),
    (lambda s: s.update(added_biases=["o"]), "bias"),
)


@pytest.mark.parametrize(("damage", "words"), BAD)
def test_settings_of_shapes_are_read_strictly(source, tmp_path, damage, words):
    compress(source, tmp_path / "out", "layer_drop:count=1,by=last")
    values = settings(tmp_path / "out")
    damage(values)
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=words):
        load(tmp_path / "out")


def test_other_formats_take_fewer_layers_and_no_other_shapes(source, tmp_path):
    fewer, _ = compress(source, tmp_path / "fewer", "layer_drop:count=1,by=last")
    SafetensorsExport(fewer).write(tmp_path / "hf")
    export = GGUFExport(fewer, parse_gguf_format("f32"))
    export.write(tmp_path / "fewer.gguf")
    for path in (tmp_path / "hf", tmp_path / "fewer.gguf"):
        again = load(path)
        assert len(again.config.layers) == 4
        assert np.array_equal(again.weights.dense("layers.3.o"), fewer.weights.dense("layers.3.o"))
    assert "layer_shapes" not in settings(tmp_path / "hf")
    other, _ = compress(source, tmp_path / "other", "attention_drop:count=1,by=last")
    with pytest.raises(ModelError, match="one shape"):
        SafetensorsExport(other)
    with pytest.raises(ModelError, match="one shape"):
        GGUFExport(other, parse_gguf_format("f32"))


def test_a_whole_model_is_run_block_by_block(source):
    model = whole_model(source)
    x = model.embed(model.texts[:1])
    for index in range(5):
        x = model.run(index, x)
    found = []
    ids = np.array(texts(source).tokens[0], np.int32)
    ReferenceEngine(source.config, source.weights).start(
        ids, lambda _, __, made: found.append(made)
    )
    expected = torch.from_numpy(np.concatenate(found))
    torch.testing.assert_close(model.logits(x[0]), expected, atol=1e-4, rtol=0)

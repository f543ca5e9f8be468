"""Tuners of whole models: they beat what they start from, and one file holds every width."""

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.reconstruct import distillation
from paceline.compress.reconstruct.distillation import (
    CompressedModel,
    Distillation,
    fixed_layer,
    round_positions,
    rounded_inputs,
)
from paceline.compress.tune.llm_qfa import _schedule
from paceline.compress.work_folder import WorkFolder
from paceline.errors import MethodError, ModelError
from paceline.models import load
from paceline.models.nested import Width
from paceline.models.tensors import Grouped, TwoGrained, Widths, from_tensors
from tests.conftest import shared

MODEL = "stories260K"


@pytest.fixture(scope="module")
def source():
    return load(shared("models", MODEL))


@pytest.fixture(scope="module")
def own(source):
    """Texts that the model wrote: it is trained without any data."""
    from paceline.training.self_text import selftext

    with LM(source.path, drafter="plain", budget=1, threads=1) as lm:
        opening = lm.tokenizer.encode("")[:1]
        written = selftext(lm.engine, 24 * 64, opening, frozenset(), temperature=1.0).tokens
    tokens = np.asarray(written[: 24 * 64], np.int64).reshape(24, 64)
    return Calibration(tokens, "own")


def compress(source, own, out, recipe):
    CompressionJob(source, out, parse_recipe(recipe)).run(own)
    return out


def divergence(source, own, path, size=None, act_bits=16, kv_bits=16):
    """Return the divergence of a checkpoint from the source on the texts that are held out."""
    model = load(path, size)

    def layers(opened):
        return [
            {
                name.split(".", 2)[2]: torch.tensor(opened.weights.dense(name))
                for name in opened.weights
                if name.startswith(f"layers.{index}.")
            }
            for index in range(len(opened.config.layers))
        ]

    outer = {
        name: torch.tensor(source.weights.dense(name))
        for name in source.weights
        if not name.startswith("layers.")
    }
    tokens = torch.from_numpy(own.tokens)
    pair = CompressedModel(source.config, outer, layers(source), [], tokens, False)
    copy = [
        {
            name: rounded_inputs(each, act_bits) if each.dim() == 2 else each
            for name, each in layer.items()
        }
        for layer in layers(model)
    ]
    return Distillation(pair, 2, kv_bits).error(copy)


@pytest.mark.parametrize(
    ("start", "settings", "below"),
    [
        ("gptq:bits=2,group=32,symmetric=false", "act_bits=8,kv_bits=4", 0.8),
        ("rtn:bits=2,group=16,scale_bits=4", "act_bits=16,kv_bits=16", 0.8),
    ],
)
def test_llm_qat_brings_the_logits_back(source, own, tmp_path, start, settings, below):
    plain = compress(source, own, tmp_path / "plain", start)
    tuner = f"llm_qat:steps=48,rate=0.02,{settings}"
    trained = compress(source, own, tmp_path / "trained", f"{start}+{tuner}")
    bits = {key: int(value) for key, _, value in (p.partition("=") for p in settings.split(","))}
    assert divergence(source, own, trained, **bits) < below * divergence(source, own, plain, **bits)
    one, other = load(plain).weights, load(trained).weights
    assert one.nbytes() == other.nbytes()
    for name in (each for each in one if each.endswith(".q")):
        assert type(one[name]) is type(other[name]) is (TwoGrained if "scale" in start else Grouped)
        assert not np.array_equal(one.dense(name), other.dense(name))


def test_llm_qfa_trains_every_width_at_once(source, own, tmp_path):
    start = "rtn:bits=4,group=32"
    tuner = "llm_qfa:min_bits=2,steps=90"
    out = compress(source, own, tmp_path / "all", f"{start}+{tuner}")
    lost = {}
    for bits in (2, 3, 4):
        plain = compress(source, own, tmp_path / f"plain{bits}", f"rtn:bits={bits},group=32")
        cut = load(out, Width(bits))
        part = cut.weights["layers.0.q"]
        assert isinstance(part, Grouped)
        assert part.bits == bits
        assert cut.weights.nbytes() == load(plain).weights.nbytes()
        lost[bits] = divergence(source, own, out, Width(bits))
        assert lost[bits] < (0.75 if bits == 2 else 0.96) * divergence(source, own, plain)
    assert lost[2] > lost[3] > lost[4]
    assert divergence(source, own, out) == lost[4]
    with LM(out, memory="3bits", drafter="plain", threads=1) as lm:
        assert lm.engine.name == "native"
        assert lm.generate("Once", max_new_tokens=4).text


def test_a_memory_between_widths_mixes_them(source, own, tmp_path):
    out = compress(source, own, tmp_path / "out", "rtn:bits=4,group=32+llm_qfa:steps=2")
    sizes = {bits: load(out, Width(bits)).weights.nbytes() for bits in (2, 4)}
    cut = load(out, sum(sizes.values()) // 2).weights
    widths = {cut[name].bits for name in cut if isinstance(cut[name], Grouped)}
    assert sizes[2] < cut.nbytes() <= sum(sizes.values()) // 2
    assert len(widths) > 1
    with pytest.raises(ModelError, match="with 2 to 4 bits, not 5"):
        load(out, Width(5))


def test_a_width_is_a_checkpoint_for_others(source, own, tmp_path):
    from paceline.models.export.compressed_tensors import CompressedTensorsExport

    out = compress(source, own, tmp_path / "out", "rtn:bits=4,group=0+llm_qfa:min_bits=3,steps=2")
    CompressedTensorsExport(load(out, Width(3))).write(tmp_path / "three")
    one, other = load(tmp_path / "three"), load(out, Width(3))
    for name in one.weights:
        np.testing.assert_array_equal(one.weights.dense(name), other.weights.dense(name))


def test_training_that_does_not_help_leaves_the_codes(source, own, tmp_path):
    start = "rtn:bits=8,group=32"
    plain = compress(source, own, tmp_path / "plain", start)
    trained = compress(source, own, tmp_path / "trained", f"{start}+llm_qat:steps=2,rate=1")
    one, other = load(plain).weights, load(trained).weights
    for name in one:
        np.testing.assert_array_equal(one.dense(name), other.dense(name))


def test_a_kill_while_all_is_trained_ends_in_the_same_bytes(source, own, tmp_path, monkeypatch):
    recipe = "awq:steps=2+gptq:bits=3,group=32+llm_qfa:min_bits=2,steps=2"
    whole = compress(source, own, tmp_path / "whole", recipe)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kept = WorkFolder.keep_tuned

        def dies(work, layers):
            kept(work, layers)
            (work.path / "tuned.json").unlink()
            raise KeyboardInterrupt

        patch.setattr(WorkFolder, "keep_tuned", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(source, own, out, recipe)
    compress(source, own, out, recipe)
    for file in whole.iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_positions_are_rounded_and_gradients_pass():
    x = torch.tensor([[7.0, -3.4, 0.2], [0.0, 0.0, 0.0]], requires_grad=True)
    rounded = round_positions(x, 4)
    torch.testing.assert_close(rounded, torch.tensor([[7.0, -3, 0], [0.0, 0, 0]]))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))
    assert round_positions(x, 16) is x


def test_keys_and_values_are_rounded_while_it_is_trained(source, own, monkeypatch):
    outer = {"embed": torch.tensor(source.weights.dense("embed"))}
    layers = [
        fixed_layer(
            {
                name.split(".", 2)[2]: torch.tensor(source.weights.dense(name))
                for name in source.weights
                if name.startswith(f"layers.{index}.")
            }
        )
        for index in range(len(source.config.layers))
    ]
    outer |= {
        name: torch.tensor(source.weights.dense(name))
        for name in source.weights
        if not name.startswith("layers.")
    }
    texts = torch.from_numpy(own.tokens)
    model = CompressedModel(source.config, outer, layers, layers, texts, False)
    assert Distillation(model, 4).error(layers) == 0
    coarse, fine = (Distillation(model, 4, bits).error(layers) for bits in (4, 8))
    assert coarse > 10 * fine > 0
    assert distillation.Distillation(model, 4).split.held.tolist() == [21, 22, 23]


def test_widths_take_turns_and_some_layers_another():
    rows = list(_schedule([2, 3, 4], 200, 6))
    for step, row in enumerate(rows):
        share = row.count([2, 3, 4][step % 3]) / len(row)
        assert 0.7 < share < 0.95
    counts = [sum(row.count(bits) for row in rows) for bits in (2, 3, 4)]
    assert max(counts) < 1.1 * min(counts)


def test_widths_are_saved_and_refused_where_they_do_not_fit(source):
    codes = np.random.default_rng(0).integers(0, 4, (3, 8)).astype(np.uint8)
    narrow = Grouped(2, codes, np.ones((3, 1), np.float32), 8)
    wide = Grouped(4, codes, np.ones((3, 1), np.float32), 8)
    losses = np.array([0.5, 0.1], np.float32)
    both = Widths((narrow, wide), losses)
    again = from_tensors(both.tensors())
    assert again.dense().tobytes() == both.dense().tobytes() == wide.dense().tobytes()
    assert again.first(1).bits == 2
    assert again.rows(np.array([0, 2])).shape == (2, 8)
    for parts, lost in (((), losses), ((wide, narrow), losses), ((narrow, wide), losses[::-1])):
        with pytest.raises(ModelError):
            Widths(parts, np.ascontiguousarray(lost))
    with pytest.raises(ModelError, match="ascending"):
        Widths((narrow, wide.rows(np.array([0]))), losses)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("rtn+llm_qat+block_ap", "put it last, once"),
        ("rtn+llm_qat+llm_qfa", "put it last, once"),
        ("magnitude+rtn+llm_qat", "llm_qat moves the codes of all weights"),
        ("rtn+llm_qat:kv_bits=3", "llm_qat:kv_bits is 3, expected 4 to 8, or 16"),
        ("rtn+llm_qfa:min_bits=8", "llm_qfa:min_bits is 8"),
    ],
)
def test_wrong_recipes_are_refused(recipe, said):
    with pytest.raises(MethodError, match=said):
        parse_recipe(recipe)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("svd+llm_qat:steps=1", "llm_qat trains integers in groups, and the recipe stores"),
        ("svd+llm_qfa:steps=1", "llm_qfa trains integers in groups, and layers.0.[a-z]+ is stored"),
        ("rtn:bits=2+llm_qfa:steps=1", "llm_qfa:min_bits is 2, expected less than the 2 bits"),
    ],
)
def test_forms_that_cannot_be_trained_are_refused(source, own, tmp_path, recipe, said):
    with pytest.raises(MethodError, match=said):
        compress(source, own, tmp_path / "out", recipe)

"""Neurons with ReLU in a file: logits of a layer in memory, few bytes read, within a budget."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import tiny
from paceline.core import TokenTree
from paceline.engines.factory import open_engine
from paceline.engines.neuron_window import NeuronFile, NeuronWindow, Screen, neuron_bytes
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError
from paceline.models import load
from paceline.models.blocks import ACTIVATIONS

HIDDEN, NEURONS = 24, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def matrices(seed, dtype=torch.float32, shift=-1.0):
    """Random weights; few neurons are active, as in models that were trained with ReLU."""
    random = torch.Generator().manual_seed(seed)
    up = torch.randn(NEURONS, HIDDEN, generator=random)
    down = torch.randn(HIDDEN, NEURONS, generator=random)
    biases = torch.randn(NEURONS, generator=random) + shift * HIDDEN**0.5, torch.randn(HIDDEN)
    return [each.to(dtype) for each in (up, biases[0], down, biases[1])]


def window(folder, given, count, activation="relu"):
    found = NeuronWindow(NeuronFile(folder), *given, activation)
    found.keep(count)
    return found


def plain(x, given, activation="relu"):
    """The layer in memory, in float64."""
    up, up_bias, down, down_bias = [None if each is None else each.double() for each in given]
    return F.linear(ACTIVATIONS[activation](F.linear(x.double(), up, up_bias)), down, down_bias)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_window_gives_what_the_layer_in_memory_does(data, folder):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    given = matrices(data.draw(st.integers(0, 9)), dtype, data.draw(st.sampled_from([-2, -1, 0])))
    if data.draw(st.booleans()):
        given[1] = None
    if data.draw(st.booleans()):
        given[3] = None
    activation = data.draw(st.sampled_from(["relu", "relu2"]))
    layer = window(folder, given, data.draw(st.integers(1, NEURONS)), activation)
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for _ in range(data.draw(st.integers(1, 6))):
        shape = *data.draw(st.sampled_from([(), (2,)])), data.draw(st.integers(1, 9)), HIDDEN
        x = torch.randn(shape, generator=random).to(dtype)
        expected = plain(x, given, activation)
        found = layer(x)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        scale = float(expected.abs().max()) + 1
        np.testing.assert_allclose(found.double(), expected, rtol=0, atol=tolerance * scale)
    held = layer._held[layer._held >= 0]
    assert len(set(held.tolist())) == len(held)
    assert (layer._slots[held] == np.flatnonzero(layer._held >= 0)).all()
    assert (layer._slots >= 0).sum() == len(held)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-4, 1e4), dtype=st.sampled_from(["fp32", "bf16"]))
def test_no_active_neuron_is_ever_screened_out_and_few_others_are_read(seed, size, dtype):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    up, bias, *_ = matrices(seed, kind, shift=-1.0 * size)
    x = (size * torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(seed))).to(kind)
    found = Screen.of(up, bias).candidates(x)
    active = (F.linear(x, up, bias) > 0).any(0).numpy().nonzero()[0]
    assert set(active) <= set(found)
    near = F.linear(x.double(), up.double(), bias.double()).amax(0)
    assert (near[found] > -0.2 * size * HIDDEN**0.5).all()


def test_what_is_no_number_is_not_hidden(folder):
    layer = window(folder, matrices(1), 32)
    x = torch.randn(2, HIDDEN)
    x[1, 3] = torch.nan
    found = layer(x)
    assert found[1].isnan().all()
    assert found[0].isfinite().all()


def test_only_what_is_new_is_read(folder):
    layer = window(folder, matrices(2), 120)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1, HIDDEN, generator=random)
    layer(x)
    first = layer.missed
    assert 0 < first == layer.used < NEURONS
    assert layer._file.read_bytes == first * layer.bundle_bytes
    layer(x)
    assert (layer.missed, layer.used) == (first, 2 * first)
    layer(x + 0.05 * torch.randn(1, HIDDEN, generator=random))  # a token like it
    assert layer.missed - first < first / 3


def test_those_used_longest_ago_leave_the_window(folder):
    layer = window(folder, matrices(3), 4)
    for some in ([0, 1], [2, 3], [0], [4], [1]):
        layer._fetch(np.array(some))
    assert sorted(layer._held.tolist()) == [0, 1, 3, 4]
    assert layer.missed == 6


@pytest.mark.parametrize("fault", ["shortened", "changed"])
def test_a_file_that_changed_ends_the_pass_and_spoils_nothing(folder, fault):
    given = matrices(4)
    layer, x = window(folder, given, 50), torch.randn(2, HIDDEN)
    descriptor, size = layer._file.descriptor, layer.neurons * layer.bundle_bytes
    kept = os.pread(descriptor, size, 0)
    if fault == "shortened":
        os.ftruncate(descriptor, layer.bundle_bytes // 2)
    else:
        os.pwrite(descriptor, bytes(byte ^ 1 for byte in kept), 0)
    said = "shorter than it was" if fault == "shortened" else "not those that were written"
    with pytest.raises(ModelError, match=said) as caught:
        layer(x)
    assert "\n" not in str(caught.value)
    assert (layer._slots < 0).all()
    os.pwrite(descriptor, kept, 0)
    np.testing.assert_allclose(layer(x), plain(x, given), atol=1e-4)


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        NeuronFile(tmp_path / "file")


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A model of OPT's shape whose neurons are mostly at rest."""
    folder = tmp_path_factory.mktemp("opt")
    made = tiny._build("OPT", ffn_dim=400, word_embed_proj_dim=40)()
    with torch.no_grad():
        for layer in made.model.decoder.layers:
            layer.fc1.bias.sub_(1.5)
    made.save_pretrained(folder)
    return load(folder)


def budget_of(model, share):
    """Bytes that hold the windows of a share of the neurons."""
    sizes = [int(np.prod(model.weights.shape(name))) for name in model.weights]
    neurons = neuron_bytes(model.config, 4)
    copies = sum(layer.intermediate * (40 + 24) for layer in model.config.layers)
    return 4 * sum(sizes) - neurons + copies + int(share * neurons)


@pytest.mark.parametrize("share", [0.17, 0.5])
def test_an_engine_with_windows_gives_the_logits_of_one_without(share, opt):
    whole = ReferenceEngine(opt.config, opt.weights)
    split = ReferenceEngine(opt.config, opt.weights, weights_memory=budget_of(opt, share))
    ours, theirs = whole.start(tiny.tokens(20)), split.start(tiny.tokens(20))
    tree = TokenTree(
        np.array([5, 6, 7, 8], np.int32),
        np.array([-1, 0, 0, 1], np.int32),
        np.ones(4, np.float32),
        np.zeros(4, np.int16),
    )
    for _ in range(3):
        expected, found = whole.forward([(ours, tree)]), split.forward([(theirs, tree)])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        whole.commit(ours, [0, 1])
        split.commit(theirs, [0, 1])
    used, missed = (sum(getattr(w, name) for w in split.windows) for name in ("used", "missed"))
    assert missed < used
    held = sum(len(each._held) for each in split.windows)
    assert split.streamed_bytes == (3 * 400 - held) * 2 * 40 * 4
    assert split.weights_memory == budget_of(opt, share)


def test_all_weights_are_within_the_budget(opt):
    budget = budget_of(opt, 0.4)
    engine = ReferenceEngine(opt.config, opt.weights, weights_memory=budget)
    tensors = [each for layer in engine._layers for each in layer.values()]
    tensors = [
        each for each in [*tensors, *engine._outer.values()] if isinstance(each, torch.Tensor)
    ]
    held = sum(each.nbytes for each in tensors)
    held += sum(each.fixed_bytes + each._window.nbytes for each in engine.windows)
    assert budget - 3 * 2 * 40 * 4 <= held <= budget
    whole = ReferenceEngine(opt.config, opt.weights, weights_memory=budget_of(opt, 1.0))
    assert (whole.windows, whole.streamed_bytes, whole.weights_memory) == ([], 0, None)


def test_a_budget_that_is_too_small_is_refused_with_the_smallest(opt):
    with pytest.raises(ModelError, match="expected at least") as caught:
        ReferenceEngine(opt.config, opt.weights, weights_memory=1000)
    least = int(str(caught.value).split("expected at least ")[1].split(":")[0])
    engine = ReferenceEngine(opt.config, opt.weights, weights_memory=least)
    assert [len(each._held) for each in engine.windows] == [64] * 3
    with pytest.raises(ModelError, match=str(least)):
        ReferenceEngine(opt.config, opt.weights, weights_memory=least - 1)


def test_models_without_relu_are_refused(tmp_path):
    tiny.save("llama-gqa-tied-bias", tmp_path)
    with pytest.raises(MethodError, match="torch holds all weights but neurons with ReLU"):
        open_engine(load(tmp_path), "reference", weights_memory=10**6)


def test_engines_that_are_opened_by_name_have_windows(opt):
    engine = open_engine(opt, "reference", weights_memory=budget_of(opt, 0.3))
    assert engine.streamed_bytes
    with pytest.raises(MethodError, match="neurons with ReLU"):
        open_engine(opt, "reference", weight_format="stored", weights_memory=10**9)
    with pytest.raises(MethodError, match="all weights on the device"):
        open_engine(opt, "static", weights_memory=10**9)

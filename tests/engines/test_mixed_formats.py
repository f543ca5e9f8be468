"""Weights that are multiplied together keep their own formats, and every bit of plain decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines import blocks
from paceline.engines.native import NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.models.tensors import Dense, Linear
from tests.engines.test_native import ISAS, path_to, run, tiny_model, trees
from tests.engines.test_stored_weights import grouped

__all__ = ["tiny_model"]  # the fixture

FORMS = ("F32", "F16", "BF16", "int4", "int4_fp16", "int4_zero", "int8", "int8_fp16", "int8_zero")
# Gated or not, with and without biases, parallel blocks, windows.
FAMILIES = ("llama", "llama-gqa-tied-bias", "gemma2", "gpt_neox", "opt", "qwen2")
KEPT = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@pytest.fixture(autouse=True)
def pairs_before_groups() -> Iterator[None]:
    """Rows of these models are so short that formats with more for a row would not be chosen."""
    with mock.patch.object(blocks, "ENOUGH", 1.2):
        yield


def stored_as(values: np.ndarray, form: str, random: np.random.Generator) -> Linear:
    """A matrix of usual weights that is kept in `form`."""
    if form == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16
        return Dense(bits.astype(np.uint16), "BF16")
    if form in KEPT:
        return Dense(values.astype(np.float16 if form == "F16" else np.float32), form)
    bits, zeros = int(form[3]), form.endswith("zero")
    kind = "BF16" if form in ("int4", "int8") else "F16"
    return grouped(random, values.shape, bits, 32, zeros, kind)


def mixed(model, form_of, seed: int = 0) -> tuple[dict[str, object], set[str]]:
    """The weights of a model with each matrix of its layers in a format of its own."""
    random = np.random.default_rng(seed)
    weights, forms = {}, set()
    for name, values in model.weights.to_arrays().items():
        weights[name] = values
        if name.startswith("layers.") and values.ndim == 2:
            form = form_of(name)
            forms.add(KEPT.get(form, form))
            weights[name] = stored_as(values, form, random)
    return weights, forms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_matrix_is_kept_in_its_own_format(family, seed, tiny_model) -> None:
    model = tiny_model(family)
    random = np.random.default_rng(seed)
    weights, forms = mixed(model, lambda _: FORMS[random.integers(len(FORMS))], seed)
    expected = run(ReferenceEngine(model.config, weights), tiny.tokens(40), 64)
    for isa in ISAS:
        engine = NativeEngine(model.config, weights, format="auto", isa=isa, threads=2)
        layers, head = engine.format.split(":head=")
        assert set(layers.split("+")) == forms
        assert head == "fp32"
        for name, matrix in weights.items():
            if isinstance(matrix, Linear):
                np.testing.assert_array_equal(engine.dense(name), matrix.dense())
        np.testing.assert_allclose(run(engine, tiny.tokens(40), 64), expected, atol=5e-3, rtol=0)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(tiny_model, data) -> None:
    model = tiny_model(data.draw(st.sampled_from(FAMILIES)))
    forms = data.draw(st.lists(st.sampled_from(FORMS), min_size=7, max_size=7))
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    weights, _ = mixed(model, lambda name: forms[parts.index(name.rpartition(".")[2])])
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = NativeEngine(model.config, weights, threads, "auto", isa)
    engine._model.worth_waking = 0
    prompt = tiny.tokens(data.draw(st.integers(1, 20)))
    sequence = engine.start(prompt, chunk=data.draw(st.integers(1, 20)))
    tree = data.draw(trees(30))
    logits = engine.forward([(sequence, tree)]).copy()
    engine.threads = data.draw(st.integers(1, 4))
    path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
    plain = run(engine, np.concatenate([prompt, tree.tokens[path]]), 1)[len(prompt) :]
    np.testing.assert_array_equal(logits[np.array(path)], plain)


@pytest.mark.parametrize("family", ["llama-gqa-tied-bias", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("part", ["k", "v", "gate", "up"])
@pytest.mark.parametrize("form", ["int4_zero", "int8"])
def test_matrices_that_lie_apart_give_the_bits_of_those_that_lie_together(
    family, part, form, tiny_model
) -> None:
    """A trivial order of the inputs of one of them moves all apart and changes no value."""
    model = tiny_model(family)
    together, _ = mixed(model, lambda _: form)
    apart = dict(together)
    for name, matrix in together.items():
        if name.endswith(f".{part}"):
            apart[name] = replace(matrix, g_idx=matrix.groups.astype(np.int32))
    for isa in ISAS:
        rows = [
            run(NativeEngine(model.config, weights, format="auto", isa=isa), tiny.tokens(30), 7)
            for weights in (together, apart)
        ]
        np.testing.assert_array_equal(*rows)


def test_the_profile_accounts_for_matrices_that_lie_apart(tiny_model) -> None:
    model = tiny_model("llama-gqa-tied-bias")
    weights, _ = mixed(model, lambda name: "int4" if name[-1] in "qe" else "F16")
    engine = NativeEngine(model.config, weights, format="auto", threads=2)
    engine._model.worth_waking = 0
    sequence = engine.start(tiny.tokens(20))
    engine.profiling = True
    engine.forward([(sequence, TokenTree.chain([3, 4, 5]))])
    parts = engine.profile()
    matrices = [parts[name] for name in ("qkv", "output", "up", "down", "head")]
    assert sum(spent.bytes for spent in matrices) == engine.weight_bytes
    assert sum(spent.macs for spent in matrices) == 3 * engine.parameters


def test_a_format_comes_before_the_values_of_all_that_are_multiplied_together(tiny_model) -> None:
    config = tiny_model("llama-gqa-tied-bias").config
    values = np.zeros((40, 40), np.float32)
    model = _native.NativeModel(config, "fp32", "fp32", "fp32", "", 1)
    model.set("layers.0.q", values)
    with pytest.raises(ValueError, match=r"'layers\.0\.v' comes too late"):
        model.set_format("layers.0.v", "fp16")
    model.set("layers.0.up.bias", np.zeros(52, np.float32))
    with pytest.raises(ValueError, match=r"'layers\.0\.gate' comes too late"):
        model.set_format("layers.0.gate", "fp16")
    model.set_format("layers.1.v", "fp16")
    assert model.get("layers.0.q").shape == (40, 40)

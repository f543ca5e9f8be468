"""GGUF files as models: config, weights and logits equal those of the same checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
import tiny_gguf
from paceline.engines.reference import ReferenceEngine
from paceline.models import Model, load
from paceline.models.tensors import BlockQuantized

BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
BLOCKS_OF_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0")


def logits(model: Model) -> np.ndarray:
    rows: list[np.ndarray] = []
    engine = ReferenceEngine(model.config, model.weights)
    engine.start(tiny.tokens(12), lambda _, __, logits: rows.append(logits))
    return np.concatenate(rows)


def plain(model: Model):
    """The config without what GGUF cannot tell: names of files, folded norms."""
    return replace(model.config, family="", norm_offset=0.0)


@pytest.mark.parametrize("name", tiny_gguf.MODELS)
def test_a_file_is_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_gguf.MODELS[name]()
    tiny_gguf.write(model, tmp_path / "tiny.gguf")
    model.save_pretrained(tmp_path / "hf")
    ours, theirs = load(tmp_path / "tiny.gguf"), load(tmp_path / "hf")
    if name == "llama-llama3":  # its scaling is worked out in the file
        for a, b in zip(ours.config.layers, theirs.config.layers, strict=True):
            np.testing.assert_allclose(a.rope.table(0, 32), b.rope.table(0, 32), atol=1e-6)
        rope = theirs.config.layers[0].rope
        layers = tuple(replace(layer, rope=rope) for layer in ours.config.layers)
        assert ours.config.context == 32
        assert replace(plain(ours), layers=layers, context=theirs.config.context) == plain(theirs)
    else:
        assert plain(ours) == plain(theirs)
    assert ours.config.norm_offset == 0
    assert set(ours.weights) == set(theirs.weights)
    for weight in ours.weights:
        expected = theirs.weights.dense(weight)
        if weight.endswith("norm"):
            expected = expected + np.float32(theirs.config.norm_offset)
        np.testing.assert_array_equal(ours.weights.dense(weight), expected, weight)
        assert ours.weights.dense(weight).flags.c_contiguous
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=0)


def sized(name: str, hidden: int, inner: int):
    settings = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2}
    if name == "GPT2":
        settings |= {"n_embd": hidden, "n_inner": inner, "n_layer": 2, "n_head": 4}
    return tiny._build(name, **settings)()


@pytest.mark.parametrize("kind", ["F16", *BLOCKS_OF_32, *BLOCKS_OF_256])
@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT2", "GPTNeoX"])
def test_every_type_keeps_its_values_through_fusion_and_pairs(
    name: str, kind: str, tmp_path: Path
) -> None:
    wide = kind in BLOCKS_OF_256
    model = sized(name, 256 if wide else 64, 512 if wide else 96)
    tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)
    model.save_pretrained(tmp_path / "hf")
    ours, theirs = load(tmp_path / "tiny.gguf"), load(tmp_path / "hf")
    for weight in ours.weights:
        expected = theirs.weights.dense(weight)
        np.testing.assert_array_equal(ours.weights.dense(weight), expected, weight)
    matrix = ours.weights.stored("layers.1.q")
    if kind != "F16":
        assert isinstance(matrix, BlockQuantized)
        assert matrix.type == kind
        assert kind.lower() in ours.weights.formats()
    np.testing.assert_allclose(
        logits(ours), tiny.oracle(model, tiny.tokens(12)), atol=2e-4, rtol=1e-4
    )


def test_matrices_of_one_file_may_differ_in_type(tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return "Q6_K" if "attn_v" in name else "Q8_0" if "embd" in name else "Q4_K"

    model = sized("Llama", 256, 512)
    tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)
    ours = load(tmp_path / "tiny.gguf")
    assert ours.weights.formats() == ("f32", "q4_k", "q6_k", "q8_0")
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=2e-4, rtol=1e-4)

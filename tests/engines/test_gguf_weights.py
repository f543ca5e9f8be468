"""GGUF files run in the native engine in their own bits, whatever types they mix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
import tiny_gguf
from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.formats import GGUF_FORMATS
from paceline.engines.native import NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.tensors import BlockQuantized, Linear
from tests.engines.test_block_formats import NAMES, blocks, config, weights_of
from tests.engines.test_loading import PEAK
from tests.engines.test_native import ISAS, run

MIXED = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q5_K", "up": "IQ4_XS", "down": "Q8_0"}


def kept(engine: NativeEngine, weights) -> None:
    for name in weights:
        if isinstance(weights[name], Linear):
            np.testing.assert_array_equal(engine.dense(name), weights[name].dense())


@pytest.mark.parametrize("gated", [True, False])
def test_each_matrix_runs_in_its_own_type(gated: bool) -> None:
    shape = config(256, 512, gated)
    weights = weights_of(shape, lambda part: MIXED.get(part, "Q5_0"))
    expected = run(ReferenceEngine(shape, weights), tiny.tokens(30), 64)
    for isa in ISAS:
        engine = NativeEngine(shape, weights, format="auto", isa=isa, threads=2)
        layers, head = engine.format.split(":head=")
        types = {"q4_k", "q6_k", "iq4_xs", "q8_0", "q5_0"} | ({"q5_k"} if gated else set())
        assert set(layers.split("+")) == types
        assert head == "q5_0"
        kept(engine, weights)
        found = run(engine, tiny.tokens(30), 64)
        np.testing.assert_allclose(found, expected, atol=2e-3 * expected.std(), rtol=0)
        sequence = engine.start(tiny.tokens(20), chunk=7)
        tree = TokenTree.chain(tiny.tokens(30)[20:].tolist())
        np.testing.assert_array_equal(engine.forward([(sequence, tree)]), found[20:])


@pytest.mark.parametrize("other", ["F32", "F16", "BF16"])
def test_floats_lie_beside_blocks(other: str, tmp_path: Path) -> None:
    model = tiny._build("Llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)()

    def kind(name: str) -> str:
        return other if any(part in name for part in ("attn_k", "ffn_up", "blk.1.")) else "Q4_K"

    tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)
    opened = load(tmp_path / "tiny.gguf")
    engine = open_engine(opened)
    assert isinstance(engine, NativeEngine)
    form = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[other]
    assert set(engine.format.split(":")[0].split("+")) == {"q4_k", form}
    kept(engine, opened.weights)


def test_every_type_of_the_reader_has_kernels() -> None:
    from paceline.models.formats.gguf_types import TYPES

    assert {name.lower() for name in TYPES} - {"f32", "f16", "bf16"} == set(GGUF_FORMATS)


def test_bytes_are_those_of_the_file() -> None:
    for name in NAMES:
        shape = config(1024, 1024)
        weights = weights_of(shape, lambda _, name=name: name)
        engine = NativeEngine(shape, weights, format="auto")
        stored = sum(each.nbytes for each in weights.values() if isinstance(each, BlockQuantized))
        # Rows of the embedding are padded to sixteen.
        assert engine.weight_bytes <= 1.03 * stored


def test_a_named_format_rounds_what_the_file_holds() -> None:
    shape = config(256, 512)
    weights = weights_of(shape, lambda _: "Q4_K")
    engine = NativeEngine(shape, weights, format="int8")
    assert engine.format == "int8"
    exact = weights["layers.0.o"].dense()
    assert 0 < np.abs(engine.dense("layers.0.o") - exact).max() < np.abs(exact).max() / 100


def test_scales_that_are_not_finite_are_refused() -> None:
    shape = config(256, 512)
    weights = weights_of(shape, lambda _: "Q4_K")
    data = weights["layers.1.v"].data
    data[-1, -144:-142] = (0, 0x7C)
    with pytest.raises(ModelError, match=r"'layers\.1\.v' holds NaN or infinite values"):
        NativeEngine(shape, weights, format="auto")


def test_rows_need_not_lie_together() -> None:
    shape = config(256, 512)
    weights = weights_of(shape, lambda _: "Q8_0")
    wide = blocks(np.random.default_rng(1), "Q8_0", 512, 256)
    weights["layers.0.up"] = BlockQuantized("Q8_0", wide.data[::-1], 256)
    kept(NativeEngine(shape, weights, format="auto"), weights)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be read")
def test_memory_peaks_little_above_the_weights(tmp_path: Path) -> None:
    """Pages of the file are given back as they are read; written once, 34 MB of Q8_0."""
    model = tiny._build("Llama", hidden_size=768, intermediate_size=2048, num_hidden_layers=5)()
    tiny_gguf.write(model, tmp_path / "tiny.gguf", "Q8_0")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "tiny.gguf", "auto"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak, after, size = json.loads(done.stdout)
    assert size > 30 << 20
    assert after - before < size + (64 << 20)
    assert peak - after < 8 << 20

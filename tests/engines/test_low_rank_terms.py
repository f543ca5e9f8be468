"""Low-rank corrections run in their own bits beside the matrix: the same sums for any pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.core import TokenTree
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import expands
from paceline.models.tensors import Grouped, Linear, LowRank, Sum
from tests.engines.test_block_formats import config, weights_of
from tests.engines.test_native import ISAS, check_every_bit


def integers(random, rows: int, inputs: int, bits: int) -> Grouped:
    codes = random.integers(0, 1 << bits, (rows, inputs)).astype(np.uint8)
    sizes = random.uniform(0.5, 1, (rows, -(-inputs // 32))) * 2.0 ** (1 - bits) * inputs**-0.5
    scales = sizes.astype(np.float16).astype(np.float32)
    return Grouped(bits, codes, scales, 32, scale_type="F16")


def corrected(random, rows: int, inputs: int, rank: int) -> Sum:
    base = integers(random, rows, inputs, 4)
    left, right = integers(random, rows, rank, 8), integers(random, rank, inputs, 8)
    return Sum((base, LowRank(left, right)))


def open_corrected(shape, chosen, seed: int = 0, rank: int = 8, **options) -> NativeEngine:
    """An engine in whose layers the matrices that `chosen(part)` names have low-rank terms."""
    random = np.random.default_rng(seed)
    weights = weights_of(shape, lambda _: "Q8_0")
    for name, weight in weights.items():
        if isinstance(weight, Linear) and name.startswith("layers."):
            rows, inputs = weight.shape
            term = chosen(name.rpartition(".")[2])
            weights[name] = (
                corrected(random, rows, inputs, rank) if term else integers(random, rows, inputs, 4)
            )
    engine = NativeEngine(shape, weights, format="auto", **options)
    engine._model.worth_waking = 0
    engine.weights = weights
    return engine


def logits_of(engine: NativeEngine, ids: np.ndarray) -> np.ndarray:
    return engine.forward([(engine.open(), TokenTree.chain(ids))]).copy()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_those_of_the_whole_matrices(isa: str, gated: bool) -> None:
    shape = config(288, 96, gated)
    engine = open_corrected(shape, lambda _: True, isa=isa, threads=2)
    assert "group4" in engine.format
    dense = {
        name: weight.dense() if isinstance(weight, Linear) else weight
        for name, weight in engine.weights.items()
    }
    plain = NativeEngine(shape, dense, 2, format="fp32", isa=isa)
    for name in ("layers.0.q", "layers.1.down"):
        np.testing.assert_allclose(engine.dense(name), dense[name], atol=1e-5)
    assert engine.weight_bytes < 0.5 * plain.weight_bytes
    ids = np.arange(13, dtype=np.int32)
    expected = logits_of(plain, ids)
    assert np.abs(logits_of(engine, ids) - expected).max() <= 2e-3 * np.abs(expected).max()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Whichever matrices have terms, whatever the tree, the threads and the instruction set."""
    shape = config(data.draw(st.sampled_from((32, 288))), 96, data.draw(st.booleans()))
    parts = data.draw(st.sets(st.sampled_from(("q", "k", "v", "o", "gate", "up", "down"))))
    seed, rank = data.draw(st.integers(0, 9)), data.draw(st.sampled_from((1, 8, 33)))
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    engine = open_corrected(shape, parts.__contains__, seed, rank, isa=isa, threads=threads)
    check_every_bit(engine, np.random.default_rng(seed), data)


def test_a_term_that_is_large_is_multiplied_out() -> None:
    random = np.random.default_rng(0)
    assert not expands(corrected(random, 96, 288, 8))
    assert expands(corrected(random, 96, 288, 96))
    base, product = corrected(random, 96, 288, 8).parts
    assert expands(Sum((base, product, product)))


def test_what_does_not_fit_is_refused() -> None:
    def model():
        return _native.NativeModel(config(288, 96), "fp32", "fp32", "fp32", "", 1)

    eight = ("group8", 1)
    one = model()
    for name, message in (("embed", "belongs to no layer"), ("layers.0.x", "is no matrix")):
        with pytest.raises(ValueError, match=message):
            one.add_low_rank(name, 8, *eight, *eight)
    with pytest.raises(ValueError, match="has the rank 0"):
        one.add_low_rank("layers.0.q", 0, *eight, *eight)
    with pytest.raises(ValueError, match="cannot hold a factor"):
        one.add_low_rank("layers.0.q", 8, "fp32", 2, *eight)
    one.add_low_rank("layers.0.q", 8, *eight, *eight)
    with pytest.raises(ValueError, match="has a low-rank term already"):
        one.add_low_rank("layers.0.q", 8, *eight, *eight)
    factor = integers(np.random.default_rng(0), 9, 288, 8)
    starts = np.arange(9, dtype=np.int32)
    with pytest.raises(ValueError, match=r"has shape \[9, 288\], expected \[8, 288\]"):
        one.load("layers.0.q.right", 8, factor.codes, factor.scales, None, starts, None)
    with pytest.raises(ValueError, match="add its low-rank term first"):
        one.load("layers.0.k.right", 8, factor.codes, factor.scales, None, starts, None)

"""Attention over contexts of several blocks and spans: against the reference, and bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.kv_formats import GROUPED_KV
from paceline.engines.native import KV_FORMATS, NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import MethodError
from paceline.models import load
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope
from tests.engines.test_native import path_to, trees

ROPE = Rope(1e4, 10)
CONFIG = ModelConfig(
    family="llama",
    vocab_size=tiny.VOCAB,
    hidden_size=40,
    context=700,
    layers=(
        LayerConfig(4, 2, 10, 24, None, ROPE),
        LayerConfig(4, 1, 24, 24, 100, ROPE),
        LayerConfig(3, 3, 16, 24, 7, ROPE),
    ),
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    attention_scale=0.5,
    attention_softcap=20.0,
    tied=True,
)


def drawn() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embed": (tiny.VOCAB, 40), "final_norm": (40,)}
    for i, layer in enumerate(CONFIG.layers):
        queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        sizes = {"q": (queries, 40), "k": (keys, 40), "v": (keys, 40), "o": (40, queries)}
        sizes |= {"gate": (24, 40), "up": (24, 40), "down": (40, 24)}
        sizes |= {"attn_norm": (40,), "mlp_norm": (40,)}
        shapes |= {f"layers.{i}.{name}": size for name, size in sizes.items()}
    return {
        name: rng.normal(0, 1.5 * size[-1] ** -0.5 if len(size) > 1 else 1, size).astype(np.float32)
        for name, size in shapes.items()
    }


WEIGHTS = drawn()


def native(kv_format: str, config: ModelConfig = CONFIG, **options) -> NativeEngine:
    engine = NativeEngine(config, WEIGHTS, kv_format=kv_format, **options)
    engine._model.worth_waking = 0  # share even the smallest pass
    return engine


def in_int8(rows: torch.Tensor) -> torch.Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).round() * scale


ROUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fp32": lambda rows: rows,
    "fp16": lambda rows: rows.half().float(),
    "int8": in_int8,
}
ROW_FORMATS = tuple(ROUND)  # those that round each position apart


class Rounded(ReferenceEngine):
    """The slow path: keys and values are rounded before anyone sees them."""

    kind = "fp32"

    def _cache(self, sequence, index, keys, values):
        return super()._cache(sequence, index, *map(ROUND[self.kind], (keys, values)))


def with_sinks(count: int) -> ModelConfig:
    """Return the shape with a window that shows the first positions, too."""
    first, second, third = CONFIG.layers
    return replace(CONFIG, layers=(first, replace(second, sinks=count), third))


LENGTHS = st.one_of(
    *(st.integers(edge - 3, edge + 3) for edge in (64, 128, 256, 320, 512)), st.integers(1, 600)
)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_logits_are_those_of_the_reference(kv_format: str, data) -> None:
    config = with_sinks(data.draw(st.sampled_from((0, 70))))
    if kv_format in GROUPED_KV:
        reference = ReferenceEngine(config, WEIGHTS, kv_format=kv_format)
    else:
        reference = Rounded(config, WEIGHTS)
        reference.kind = kv_format
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 3))
    engine = native(kv_format, config, isa=isa, threads=threads)
    prompt, tree = tiny.tokens(data.draw(LENGTHS)), data.draw(trees(40))
    share = data.draw(st.sampled_from((0.3, 0.95, 1.0)))  # runs of any length
    positions = np.flatnonzero(np.random.default_rng(len(prompt)).random(len(prompt)) < share)
    some = kv_format in ROW_FORMATS and data.draw(st.booleans())
    view = View(positions=positions.astype(np.int32)) if some else None
    found = engine.forward([(engine.start(prompt), tree)], view=view)
    expected = reference.forward([(reference.start(prompt), tree)], view=view)
    # Where a number lies between two steps, noise decides; and some nodes magnify it tenfold.
    close, near = {"fp32": (5e-4, 1e-4), "fp16": (2e-2, 1e-3), "int8": (0.3, 0.03)}.get(
        kv_format, (1.5, 0.1)
    )
    np.testing.assert_allclose(found, expected, atol=close, rtol=0)
    assert np.median(np.abs(found - expected)) < near


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(data) -> None:
    """Wherever the tree begins, however it branches and whoever shares the work."""
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 4))
    engine = native(data.draw(st.sampled_from(KV_FORMATS)), isa=isa, threads=threads)
    prompt, tree = tiny.tokens(data.draw(LENGTHS)), data.draw(trees(data.draw(st.integers(1, 90))))
    sequence = engine.start(prompt, chunk=data.draw(st.integers(1, 600)))
    other = engine.start(tiny.tokens(data.draw(LENGTHS), seed=1))
    logits = engine.forward([(other, TokenTree.root(3)), (sequence, tree)])[1:].copy()
    path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
    engine.threads = data.draw(st.integers(1, 4))
    plain = engine.start(prompt, chunk=data.draw(st.integers(1, 600)))
    for node in path:
        row = engine.forward([(plain, TokenTree.root(int(tree.tokens[node])))])[0]
        np.testing.assert_array_equal(logits[node], row)
        engine.commit(plain, [0])
    engine.forward([(sequence, tree)])
    engine.commit(sequence, path)
    follow = engine.forward([(sequence, TokenTree.root(7))]).copy()
    np.testing.assert_array_equal(follow, engine.forward([(plain, TokenTree.root(7))]))
    fork = engine.fork(sequence)
    engine.rewind(fork, prompt)
    np.testing.assert_array_equal(engine.forward([(fork, tree)]), logits)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_instruction_sets_with_fused_sums_agree_in_every_bit(kv_format: str) -> None:
    rows = []
    for isa in _native.isas():
        if isa != "portable":
            engine = native(kv_format, isa=isa)
            tree = TokenTree.chain(tiny.tokens(20, seed=2))
            rows.append(engine.forward([(engine.start(tiny.tokens(300)), tree)]).copy())
    for logits in rows[1:]:
        np.testing.assert_array_equal(logits, rows[0])


def test_the_reference_engine_refuses_a_cache_format() -> None:
    model = load()
    with pytest.raises(
        MethodError, match=r"the reference engine and kv_format=int8 do not go together"
    ):
        open_engine(model, "reference", kv_format="int8")
    assert open_engine(model, kv_format="int8").kv_format == "int8"
    assert open_engine(model).kv_format == "fp32"


def test_smaller_formats_take_less() -> None:
    bytes_of = {name: native(name).position_bytes for name in KV_FORMATS}
    floats = 2 * (10 + 16) + (24 + 32) + 3 * (16 + 16)  # values are padded to sixteens
    scales = 2 * 4 * (2 + 1 + 3)
    whole = 2 * 2 * 32 + 2 * 32 + 3 * 2 * 32  # in groups all sizes are multiples of 32
    assert bytes_of == {
        "fp32": 4 * floats,
        "fp16": 2 * floats,
        "int8": floats + scales,
        "int4": whole * 5 / 8,  # a scale and a minimum in fp16 for 32 numbers
        "int3": whole * 4 / 8,
    }
    engine = native("int8")
    sequence = engine.start(tiny.tokens(64))
    assert sequence.bytes == 64 * bytes_of["int8"]

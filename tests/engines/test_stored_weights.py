"""Stored matrices run as they are: what the engine holds is, bit for bit, what the file says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import tiny
from paceline import _native
from paceline.engines import open_engine
from paceline.engines.formats import BITS, FORMATS
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import Blocks
from paceline.engines.reference import ReferenceEngine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.formats.compressed_tensors import quantize
from paceline.models.tensors import BitPlanes, Dense, Grouped, Linear, LowRank, TwoGrained
from tests.conftest import shared
from tests.engines.test_native import ISAS, path_to, run, tiny_model, trees
from tests.models.test_packed_layouts import packed_checkpoint
from tests.models.test_tensors import floats

__all__ = ["tiny_model"]  # the fixture

INTEGERS = tuple(name for name in FORMATS if name.startswith("int"))


def grouped(random, shape, bits, group, zeros, kind, order=False) -> Grouped:
    """Weights of a usual size, as integers."""
    rows, columns = shape
    group = min(group, columns)
    groups = -(-columns // group)
    scales = np.maximum(np.abs(floats(random, (rows, groups), kind)[1]), np.float32(2**-6))
    scales = scales * np.float32(2.0 ** -(bits + 2))
    g_idx = np.arange(columns, dtype=np.int32) // group
    points = random.integers(0, 1 << bits, (rows, groups)).astype(np.uint16)
    return Grouped(
        bits,
        random.integers(0, 1 << bits, shape).astype(np.uint8),
        scales,
        group,
        points if zeros else None,
        g_idx=random.permutation(g_idx) if order else None,
        scale_type=kind,
    )


def stored(model, **options) -> dict[str, object]:
    """The weights of a model with all matrices of its layers as integers."""
    random = np.random.default_rng(options.pop("seed", 0))
    weights = {}
    for name, values in model.weights.to_arrays().items():
        if name.startswith("layers.") and values.ndim == 2:
            matrix = grouped(random, values.shape, **options)
            if matrix.g_idx is not None:  # the same for all that read the same inputs
                order = np.random.default_rng(values.shape[1])
                matrix = replace(matrix, g_idx=order.permutation(np.sort(matrix.g_idx)))
            weights[name] = matrix
        else:
            weights[name] = values
    return weights


CASES = [
    ({"bits": 4, "group": 32, "zeros": False, "kind": "BF16"}, "int4"),
    ({"bits": 4, "group": 64, "zeros": False, "kind": "F16"}, "group4"),
    ({"bits": 4, "group": 32, "zeros": True, "kind": "F16"}, "group4_zero"),
    ({"bits": 4, "group": 999, "zeros": True, "kind": "BF16"}, "group4_zero"),
    ({"bits": 3, "group": 32, "zeros": True, "kind": "BF16"}, "group3_zero"),
    ({"bits": 2, "group": 32, "zeros": False, "kind": "F16"}, "group2"),
    ({"bits": 6, "group": 32, "zeros": True, "kind": "BF16"}, "group6_zero"),
    ({"bits": 8, "group": 32, "zeros": False, "kind": "BF16"}, "int8"),
    ({"bits": 8, "group": 999, "zeros": False, "kind": "F16"}, "group8"),
    ({"bits": 8, "group": 32, "zeros": True, "kind": "F16"}, "group8_zero"),
    ({"bits": 4, "group": 32, "zeros": True, "kind": "F16", "order": True}, "group4_zero"),
    ({"bits": 4, "group": 32, "zeros": False, "kind": "BF16", "order": True}, "int4"),
    ({"bits": 4, "group": 20, "zeros": False, "kind": "BF16"}, "fp16"),  # 11 bits hold the products
]


@pytest.mark.parametrize(("options", "form"), CASES)
@pytest.mark.parametrize("name", ["llama-gqa-tied-bias", "gpt_neox"])
def test_integers_are_kept_to_the_bit(options, form, name, tiny_model) -> None:
    model = tiny_model(name)
    weights = stored(model, **options)
    expected = run(ReferenceEngine(model.config, weights), tiny.tokens(40), 64)
    for isa in ISAS:
        engine = NativeEngine(model.config, weights, format="auto", isa=isa, threads=2)
        assert engine.format == f"{form}:head=fp32"
        for weight, matrix in weights.items():
            if isinstance(matrix, Linear):
                np.testing.assert_array_equal(engine.dense(weight), matrix.dense())
        # Only the rounding of activations to 16 bits is left.
        np.testing.assert_allclose(run(engine, tiny.tokens(40), 64), expected, atol=2e-3, rtol=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(tiny_model, data) -> None:
    model = tiny_model(data.draw(st.sampled_from(["llama", "gemma2", "phi3"])))
    options, _ = data.draw(st.sampled_from(CASES))
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    weights = stored(model, seed=data.draw(st.integers(0, 9)), **options)
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


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 8),
    st.sampled_from([32, 64, 96, 100]),
    st.booleans(),
    st.sampled_from(["F32", "F16", "BF16"]),
    st.booleans(),
)
def test_a_format_holds_integers_exactly_or_not_at_all(
    tiny_model, seed, bits, group, zeros, kind, order
) -> None:
    """Scales of any size, in the layout of every format that says that it holds them."""
    model = tiny_model("llama")
    random = np.random.default_rng(seed)
    matrix = grouped(random, (40, 40), bits, group, zeros, "F32", order)
    _, scales = floats(random, matrix.scales.shape, kind)
    scales = scales * np.exp2(random.integers(-12, 12, scales.shape)).astype(np.float32)
    matrix = replace(matrix, scales=scales)
    block = Blocks.of(matrix)
    assert block is not None
    weights = model.weights.to_arrays()
    weights["layers.1.o"] = matrix
    held = [name for name in INTEGERS if block.fits(name)]
    if kind == "F32":
        assert not held
    if kind == "BF16" and bits == 8 and not zeros:
        assert "int8" in held
    if zeros and bits > 4 and not (block.zeros == 1 << (bits - 1)).all():
        assert "int4_zero" not in held
    for name in held:
        engine = NativeEngine(model.config, weights, format=name)
        np.testing.assert_array_equal(engine.dense("layers.1.o"), matrix.dense())
    engine = NativeEngine(model.config, weights, format="auto")
    np.testing.assert_array_equal(engine.dense("layers.1.o"), matrix.dense())
    others = {name: weights[name] for name in ("layers.1.q", "layers.0.o", "embed")}
    for name, values in others.items():
        np.testing.assert_array_equal(engine.dense(name), values)


@pytest.mark.parametrize(
    ("bits", "kind", "step_bits", "form"),
    [
        (3, "", 6, "nested3"),
        (4, "zeros", 4, "nested4_zero"),
        (2, "levels", 6, "levels2"),
        (4, "levels", 6, "levels4"),
        (4, "", 8, "group4"),
        (7, "", 5, "nested8"),
        (5, "levels", 6, "fp32"),  # more levels than a register holds
    ],
)
def test_scales_in_two_grains_are_kept_to_the_bit(bits, kind, step_bits, form, tiny_model) -> None:
    model = tiny_model("llama-gqa-tied-bias")
    random = np.random.default_rng(bits)

    def matrix(shape: tuple[int, int]) -> TwoGrained:
        rows, groups, size = shape[0], -(-shape[1] // 32), 1e-4 if kind != "levels" else 1e-5
        zeros = random.integers(0, 1 << bits, (rows, groups)).astype(np.uint8)
        return TwoGrained(
            bits,
            random.integers(0, 1 << bits, shape).astype(np.uint8),
            32,
            random.integers(0, 1 << step_bits, (rows, groups)).astype(np.uint8),
            step_bits,
            (size * random.uniform(1, 3, rows)).astype(np.float16).astype(np.float32),
            zeros if kind == "zeros" else None,
            random.integers(-128, 128, 1 << bits).astype(np.int8) if kind == "levels" else None,
        )

    weights = {
        name: matrix(values.shape) if name.startswith("layers.") and values.ndim == 2 else values
        for name, values in model.weights.to_arrays().items()
    }
    expected = run(ReferenceEngine(model.config, weights), tiny.tokens(40), 64)
    for isa in ISAS:
        engine = NativeEngine(model.config, weights, format="auto", isa=isa, threads=2)
        assert engine.format == (f"{form}:head=fp32" if form != "fp32" else form)
        for weight, each in weights.items():
            if isinstance(each, Linear):
                np.testing.assert_array_equal(engine.dense(weight), each.dense())
        np.testing.assert_allclose(run(engine, tiny.tokens(40), 64), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
@pytest.mark.parametrize("group", [32, 128])
def test_a_packed_checkpoint_runs_at_its_bits(method, group, tmp_path) -> None:
    made = packed_checkpoint(tmp_path, method, group)
    model = load(tmp_path)
    engine = open_engine(model)
    assert isinstance(engine, NativeEngine)
    assert engine.format == "group4_zero:head=fp16"
    for name in model.weights:
        if name.startswith("layers.") and isinstance(model.weights[name], Linear):
            np.testing.assert_array_equal(engine.dense(name), model.weights.dense(name))
    down = made["model.layers.1.mlp.down_proj"]
    np.testing.assert_array_equal(engine.dense("layers.1.down"), down.dense())
    own = open_engine(model, weight_format="int4:head=fp16")
    assert 0.9 * own.weight_bytes < engine.weight_bytes < 1.05 * own.weight_bytes
    ids = np.array(model.tokenizer.encode("Once upon a time there was a little girl"), np.int32)
    expected = run(open_engine(model, "reference"), ids, 64)
    np.testing.assert_allclose(run(engine, ids, 64), expected, atol=0.02, rtol=0)


def test_layers_out_of_the_quantisation_stay_as_they_are(tmp_path) -> None:
    """What a file holds in 16 bits is not rounded to 8, and its neighbours keep their own bits."""
    packed_checkpoint(tmp_path, "awq")
    tensors = load_file(tmp_path / "model.safetensors")
    source = load_file(shared("models", "TinyStories-656K") / "model.safetensors")
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = source[f"{module}.weight"].astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    engine = open_engine(model)
    assert isinstance(engine, NativeEngine)
    for name in model.weights:
        if name.startswith("layers.") and isinstance(model.weights[name], Linear):
            np.testing.assert_array_equal(engine.dense(name), model.weights.dense(name))
    assert isinstance(model.weights["layers.0.down"], Dense)
    assert engine.format == "group4_zero+fp16:head=fp16"


def test_forms_without_a_kernel_are_unpacked_exactly(tiny_model) -> None:
    model = tiny_model("llama")
    random = np.random.default_rng(3)
    weights = model.weights.to_arrays()
    planes = BitPlanes(random.random((2, 40, 40)) < 0.5, np.full((2, 40, 1), 0.125, np.float32), 40)
    left, right = (random.normal(size=shape).astype(np.float32) for shape in ((40, 3), (3, 40)))
    weights |= {"layers.0.o": planes, "layers.1.o": LowRank(Dense(left), Dense(right))}
    engine = NativeEngine(model.config, weights, format="auto")
    assert engine.format == "fp32+bf16:head=fp32"
    for name in ("layers.0.o", "layers.1.o"):
        np.testing.assert_array_equal(engine.dense(name), weights[name].dense())


def test_orders_that_differ_among_weights_multiplied_together_are_kept(tiny_model) -> None:
    """Keys whose inputs are grouped in another order than those of the queries beside them."""
    model = tiny_model("llama")
    weights = stored(model, bits=4, group=32, zeros=True, kind="F16", order=True)
    key = weights["layers.0.k"]
    weights["layers.0.k"] = replace(key, g_idx=np.ascontiguousarray(key.g_idx[::-1]))
    expected = run(ReferenceEngine(model.config, weights), tiny.tokens(20), 64)
    for form, found in (("auto", "group4_zero"), ("int4_zero:head=fp32", "int4_zero")):
        engine = NativeEngine(model.config, weights, format=form)
        assert engine.format == f"{found}:head=fp32"
        logits = run(engine, tiny.tokens(20), 64)
        np.testing.assert_allclose(logits, expected, atol=2e-3, rtol=0)
        for name in weights:
            if isinstance(weights[name], Linear):
                np.testing.assert_array_equal(engine.dense(name), weights[name].dense())


def test_a_named_format_keeps_what_it_holds_and_rounds_the_rest(tiny_model) -> None:
    model = tiny_model("llama")
    weights = model.weights.to_arrays()
    whole = quantize(np.pad(weights["layers.0.o"], ((0, 0), (0, 24))), 4)
    weights["layers.0.o"] = replace(whole, codes=np.ascontiguousarray(whole.codes[:, :40]))
    for form in ("int4", "int8"):
        engine = NativeEngine(model.config, weights, format=form)
        np.testing.assert_array_equal(engine.dense("layers.0.o"), weights["layers.0.o"].dense())
        assert not np.array_equal(engine.dense("layers.1.o"), weights["layers.1.o"])


def test_what_the_kernels_cannot_take_is_refused(tiny_model) -> None:
    model = _native.NativeModel(tiny_model("llama").config, "fp32", "fp32", "fp32", "", 1)
    codes, scales = np.zeros((40, 40), np.uint8), np.ones((40, 2), np.float32)
    groups, name = np.int32([0, 1]), "layers.0.o"
    model.set_format(name, "int4")
    for change, said in (
        ({"name": "layers.9.o"}, "none of the 3 layers"),
        ({"name": "layers.0.x"}, "no matrix of this model"),
        ({"name": "head.x"}, "no matrix of this model"),
        ({"bits": 9}, "codes have 9 bits"),
        ({"codes": codes + 16}, "more than its bits"),
        ({"codes": codes[:8]}, "differ in rows"),
        ({"codes": np.zeros((40, 41), np.uint8)}, "shape"),
        ({"scales": scales / 3}, "cannot be kept as it is in int4"),
        ({"zeros": np.zeros((40, 2), np.uint16)}, "cannot be kept as it is in int4"),
        ({"zeros": np.zeros((40, 1), np.uint16)}, "differ in size"),
        ({"block_groups": np.int32([0, 2])}, "none of the groups"),
        ({"block_groups": np.int32([0])}, "expected one for every 32 inputs"),
        ({"order": np.zeros(40, np.int32)}, "or one twice"),
        ({"order": np.arange(39, dtype=np.int32)}, "differ in inputs"),
    ):
        given_ = {
            "name": name,
            "bits": 4,
            "codes": codes,
            "scales": scales,
            "zeros": None,
            "block_groups": groups,
            "order": None,
        }
        with pytest.raises(ValueError, match=said):
            model.load(**(given_ | change))
    model.load(name, 4, codes, scales, None, groups, None)
    with pytest.raises(ValueError, match="too late"):
        model.set_format(name, "int8")
    with pytest.raises(ValueError, match="is unknown; choose one of fp32"):
        model.set_format("layers.1.o", "int5")
    with pytest.raises(ModelError, match=r"no matrix 'layers\.0\.norm'"):
        open_engine(tiny_model("llama")).dense("layers.0.norm")


def test_sizes_of_formats() -> None:
    assert BITS["int4"] == 4.5
    assert 4.75 < BITS["int4_zero"] < 4.8
    assert BITS["fp16"] == 16

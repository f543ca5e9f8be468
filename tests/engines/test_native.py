"""The native engine: close to the reference, the same bits for any batch, hard to break."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines.native import FORMATS, KV_FORMATS, NativeEngine, default_threads
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models import Model, load
from paceline.models.tensors import to_dense
from tests.conftest import shared

TOLERANCE = 1e-4
ISAS = _native.isas()
SPECS = (*FORMATS, "ternary:head=fp32", "int4:head=int4", "bf16:head=int8")
VARIED = (
    *("llama-gqa-tied-bias", "gemma2", "gpt_neox", "opt", "smollm3-window", "bitnet-silu-tied"),
    *("olmo3-yarn", "olmo-clipped", "granite-bias", "cohere2", "hunyuan-alpha"),
)


def run(engine, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits of every position, prefilled in chunks."""
    rows: list[np.ndarray] = []
    engine.release(engine.start(ids, lambda _, __, logits: rows.append(logits.copy()), chunk))
    return np.concatenate(rows)


def check_every_bit(engine, random: np.random.Generator, data) -> None:
    """Logits of a drawn tree are those of plain decoding, and those of some tokens the same."""
    prompt = random.integers(0, 32, data.draw(st.integers(1, 60))).astype(np.int32)
    sequence = engine.start(prompt, chunk=data.draw(st.integers(1, 60)))
    tree = data.draw(trees(40))
    logits = engine.forward([(sequence, tree)]).copy()
    vocabulary, count = engine.config.vocab_size, data.draw(st.integers(1, 40))
    tokens = np.sort(random.choice(vocabulary, count, False)).astype(np.int32)
    some = engine.forward([(sequence, tree)], view=View(tokens=tokens))
    np.testing.assert_array_equal(some, logits[:, tokens])
    engine.threads = data.draw(st.integers(1, 4))
    path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
    plain = run(engine, np.concatenate([prompt, tree.tokens[path]]), 1)[len(prompt) :]
    np.testing.assert_array_equal(logits[np.array(path)], plain)


def as_ternary(values: np.ndarray) -> np.ndarray:
    """Each weight -s, 0 or s, with one s for a row."""
    scale = np.abs(values).mean(1, keepdims=True)
    return np.clip(np.rint(values / (scale + 1e-30)), -1, 1) * scale


def native(model: Model, **options) -> NativeEngine:
    """The model in the native engine; its layers made ternary where that is the format."""
    weights = model.weights
    if options.get("format", "").startswith("ternary"):
        weights = {
            name: as_ternary(to_dense(values)) if values.ndim == 2 and "." in name else values
            for name, values in weights.items()
        }
    engine = NativeEngine(model.config, weights, **options)
    engine._model.worth_waking = 0  # share even the smallest pass
    return engine


def tree_of(tokens, parents) -> TokenTree:
    n = len(tokens)
    return TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.zeros(n, np.int16),
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory):
    """Opens tiny models by name, each written once."""
    models: dict[str, Model] = {}

    def open_model(name: str) -> Model:
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder)
            models[name] = load(folder)
        return models[name]

    return open_model


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_are_those_of_the_reference(name: str, tiny_model) -> None:
    model = tiny_model(name)
    ids = tiny.tokens(min(40, model.config.context))
    expected = run(ReferenceEngine(model.config, model.weights), ids, 64)
    for isa in ISAS:
        logits = run(native(model, isa=isa, threads=2), ids, 64)
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


def test_real_logits_are_those_of_the_reference(real_model: Path) -> None:
    model = load(real_model)
    ids = np.random.default_rng(0).integers(3, 500, 150).astype(np.int32)
    expected = run(ReferenceEngine(model.config, model.weights), ids, 150)
    np.testing.assert_allclose(run(native(model), ids, 64), expected, atol=TOLERANCE, rtol=0)


@st.composite
def trees(draw, most: int) -> TokenTree:
    """Any tree of up to `most` nodes, siblings distinct."""
    n = draw(st.integers(1, most))
    wide = draw(st.booleans())
    parents = [-1] + [draw(st.integers(0 if wide else max(0, i - 2), i - 1)) for i in range(1, n)]
    tokens = [draw(st.integers(0, tiny.VOCAB - 1))]
    used: dict[int, set[int]] = {}
    for parent in parents[1:]:
        token = draw(st.integers(0, tiny.VOCAB - 1))
        while token in used.setdefault(parent, set()):
            token = (token + 1) % tiny.VOCAB
        used[parent].add(token)
        tokens.append(token)
    return tree_of(tokens, parents)


def path_to(tree: TokenTree, node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, int(tree.parents[path[0]]))
    return path


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_plain_decoding(tiny_model, data) -> None:
    """Whatever the tree, the neighbours, the chunks and the threads."""
    model = tiny_model(data.draw(st.sampled_from(VARIED)))
    isa, threads = data.draw(st.sampled_from(ISAS)), data.draw(st.integers(1, 4))
    storage, cached = data.draw(st.sampled_from(SPECS)), data.draw(st.sampled_from(KV_FORMATS))
    engine = native(model, isa=isa, threads=threads, format=storage, kv_format=cached)
    batch, prompts = [], []
    for seed in range(data.draw(st.integers(1, 3))):
        prompt = tiny.tokens(data.draw(st.integers(1, 24)), seed)
        sequence = engine.start(prompt, chunk=data.draw(st.integers(1, 24)))
        batch.append((sequence, data.draw(trees(30 if seed == 0 else 6))))
        prompts.append(prompt)
    logits = engine.forward(batch).copy()

    engine.threads = data.draw(st.integers(1, 4))
    first = 0
    for (sequence, tree), prompt in zip(batch, prompts, strict=True):
        node = data.draw(st.integers(0, len(tree) - 1))
        path = path_to(tree, node)
        plain = run(engine, np.concatenate([prompt, tree.tokens[path]]), 1)[len(prompt) :]
        np.testing.assert_array_equal(logits[first + np.array(path)], plain)
        engine.commit(sequence, path)
        follow = engine.forward([(sequence, TokenTree.root(7))])[0].copy()
        whole = np.concatenate([prompt, tree.tokens[path], [7]])
        np.testing.assert_array_equal(follow, run(engine, whole, 64)[-1])
        first += len(tree)


@pytest.mark.parametrize("storage", FORMATS)
def test_many_nodes_and_long_prompts_keep_every_bit(storage: str) -> None:
    """Enough nodes for several tiles and blocks, on a real checkpoint with wider rows."""
    model = load(shared("models", "bitstories-3M"))
    ids = np.random.default_rng(1).integers(3, 500, 120).astype(np.int32)
    for isa in ISAS:
        engine = native(model, isa=isa, threads=1, format=storage)
        expected = run(engine, ids, 1 if isa == ISAS[0] else 5)
        engine.threads = 3
        np.testing.assert_array_equal(run(engine, ids, 120), expected)
        sequence = engine.start(ids[:-1])
        star = tree_of([ids[-1], *range(100)], [-1] + [0] * 100)
        np.testing.assert_array_equal(engine.forward([(sequence, star)])[0], expected[-1])


def stored(engine: NativeEngine, name: str) -> np.ndarray:
    """A matrix as the engine holds it."""
    return engine.dense(name)


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bf16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def fp16(values: np.ndarray) -> np.ndarray:
    """Rounded to fp16."""
    return values.astype(np.float16).astype(np.float32)


def in_blocks(
    values: np.ndarray, low: int, factors: tuple[float, ...], rounds: int = 1, to=bf16
) -> np.ndarray:
    """Integers from `low` to `-1 - low` with one scale for 32 inputs, as floats again."""
    rows, inputs = values.shape
    blocks = np.pad(values, ((0, 0), (0, -inputs % 32))).reshape(rows, -1, 32)
    edge = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    least = np.full_like(edge, np.inf)
    best = np.zeros_like(blocks)
    for factor in factors:
        scale = to(edge / np.float32(low) * np.float32(factor))
        for _ in range(rounds):
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
            numbers = np.rint(np.clip(blocks * inverse, low, -1 - low))
            found = numbers * scale
            error = in_order(np.square(blocks - found))
            best = np.where(error < least, found, best)
            least = np.minimum(error, least)
            square = in_order(np.square(numbers))
            scale = to(in_order(blocks * numbers) / np.maximum(square, 1))
    return best.reshape(rows, -1)[:, :inputs]


def between(values: np.ndarray, top: int) -> np.ndarray:
    """Codes 0 to `top` from the smallest to the largest of 32 inputs, as floats again."""
    rows, inputs = values.shape
    blocks = np.pad(values, ((0, 0), (0, -inputs % 32))).reshape(rows, -1, 32)
    low, high = np.minimum(blocks.min(-1), 0)[..., None], np.maximum(blocks.max(-1), 0)[..., None]
    scale = fp16((high - low) / np.float32(top))
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)

    def code(x: np.ndarray) -> np.ndarray:
        return np.floor(np.clip(x, 0, top) + np.float32(0.5))

    zero = code(-low * inverse)
    found = (code(blocks * inverse + zero) - zero) * scale
    return found.reshape(rows, -1)[:, :inputs]


def in_order(values: np.ndarray) -> np.ndarray:
    """Sums over the last axis, rounded to float32 after each term."""
    return np.add.accumulate(values, -1, np.float32)[..., -1:]


FOUR_BITS = (1.12, 1.03, 0.94, 0.85, 0.76)
ROUNDED = {
    "bf16": bf16,
    "fp16": fp16,
    "int8": lambda values: in_blocks(values, -128, (1.0, 1.008)),
    "int4": lambda values: in_blocks(values, -8, FOUR_BITS, 2),
    "int8_fp16": lambda values: in_blocks(values, -128, (1.0, 1.008), to=fp16),
    "int4_fp16": lambda values: in_blocks(values, -8, FOUR_BITS, 2, fp16),
    "int8_zero": lambda values: between(values, 255),
    "int4_zero": lambda values: between(values, 15),
}


@pytest.mark.parametrize("storage", ROUNDED)
@pytest.mark.parametrize("name", ["llama-gqa-tied-bias", "gpt_neox"])
def test_formats_round_weights_as_they_say(storage: str, name: str, tiny_model) -> None:
    model = tiny_model(name)
    rounded = model.weights.to_arrays()
    for weight, values in rounded.items():
        if values.ndim == 2 and weight != "positions":
            rounded[weight] = ROUNDED[storage](values)
    ids = tiny.tokens(40)
    expected = run(ReferenceEngine(model.config, rounded), ids, 64)
    for isa in ISAS:
        engine = native(model, format=f"{storage}:head={storage}", isa=isa)
        for weight in ("embed", "layers.0.q", "layers.1.v", "layers.2.up", "layers.2.down"):
            np.testing.assert_array_equal(stored(engine, weight), rounded[weight])
        logits = run(engine, ids, 64)
        np.testing.assert_allclose(logits, expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("storage", FORMATS)
def test_instruction_sets_with_fused_sums_agree_in_every_bit(storage: str, tiny_model) -> None:
    model = tiny_model("gemma2")
    ids = tiny.tokens(40)
    isas = [isa for isa in ISAS if isa != "portable"]
    fused = [run(native(model, isa=isa, format=storage), ids, 64) for isa in isas]
    for logits in fused[1:]:
        np.testing.assert_array_equal(logits, fused[0])


@pytest.mark.parametrize("name", ["bitstories-1M", "bitstories-3M"])
def test_ternary_keeps_a_bitnet_checkpoint(name: str) -> None:
    """Every weight to the bit, and logits up to the int16 rounding of activations."""
    model = load(shared("models", name))
    exact = NativeEngine(model.config, model.weights, format="fp32")
    engine = NativeEngine(model.config, model.weights, format="ternary:head=fp32")
    assert engine.weight_bytes < 0.13 * exact.weight_bytes
    for weight, values in model.weights.to_arrays().items():
        if values.ndim == 2:
            np.testing.assert_array_equal(stored(engine, weight), values)
    ids = np.random.default_rng(2).integers(3, 500, 100).astype(np.int32)
    expected = run(exact, ids, 64)
    error = np.abs(run(engine, ids, 64) - expected).max() / np.abs(expected).max()
    assert error < 2e-4


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_ternary_rows_are_kept_to_the_bit(tiny_model, data) -> None:
    """Any scale for each row, and rows of zeros; one weight that fits not is refused."""
    model = tiny_model("llama-gqa-tied-bias")
    weights = model.weights.to_arrays()
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    for name, values in weights.items():
        if values.ndim == 2 and name != "embed":
            signs = rng.integers(-1, 2, values.shape) * rng.integers(0, 2, (len(values), 1))
            sizes = np.exp(rng.normal(0, 8, (len(values), 1)))
            weights[name] = (signs * sizes).astype(np.float32)
    isa = data.draw(st.sampled_from(ISAS))
    engine = NativeEngine(model.config, weights, format="ternary", isa=isa)
    matrices = [name for name, values in weights.items() if values.ndim == 2 and name != "embed"]
    for name in matrices:
        np.testing.assert_array_equal(stored(engine, name), weights[name])
    name = data.draw(st.sampled_from(matrices))
    row = data.draw(st.integers(0, len(weights[name]) - 1))
    weights[name][row, :2] = [1.0, np.nextafter(np.float32(1), np.float32(2))]
    with pytest.raises(ModelError, match=f"'{name}' is not ternary"):
        NativeEngine(model.config, weights, format="ternary", isa=isa)


def test_embedding_and_head_have_their_own_format(tiny_model) -> None:
    for name in ("llama", "llama-gqa-tied-bias"):
        model = tiny_model(name)
        ids = tiny.tokens(20)
        engine = native(model, format="int4:head=fp32")
        assert engine.format == "int4:head=fp32"
        np.testing.assert_array_equal(stored(engine, "embed"), model.weights["embed"])
        assert native(model, format="int4").format == "int4:head=int8"
        assert native(model, format="int4:head=int4").format == "int4"
        assert native(model, format="int8:head=int8").format == native(model, format="int8").format
        expected = run(native(model, format="fp32"), ids, 64)
        errors = [
            np.abs(run(native(model, format=text), ids, 64) - expected).max()
            for text in ("fp32:head=int4", "fp32:head=int8", "fp32:head=fp32")
        ]
        assert errors[0] > 4 * errors[1] > errors[2] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.uint16])
def test_weights_must_be_finite(value: float, kind: type, tiny_model) -> None:
    engine = native(tiny_model("llama"))
    model = _native.NativeModel(engine.config, "int8", "int8", "fp32", "", 2)
    for name, shape in (("layers.0.q", (40, 40)), ("final_norm", (40,))):
        values = np.ones(shape, np.float32)
        values[(-1,) * len(shape)] = value
        values = (values.view(np.uint32) >> 16) if kind is np.uint16 else values
        with pytest.raises(ValueError, match=f"'{name}' holds NaN or infinite"):
            model.set(name, values.astype(kind))


def test_truncate_and_fork(tiny_model) -> None:
    engine = native(tiny_model("mistral-window"))
    ids = tiny.tokens(40)
    expected = run(engine, ids, 64)
    sequence = engine.start(ids[:30])
    other = engine.fork(sequence)
    engine.extend(sequence, ids[:5])
    engine.truncate(sequence, 17)
    assert (sequence.length, other.length) == (17, 30)
    for cached in (sequence, other):
        rest = TokenTree.chain(ids[cached.length :])
        np.testing.assert_array_equal(engine.forward([(cached, rest)]), expected[cached.length :])


def test_release_gives_memory_back(tiny_model) -> None:
    engine = native(tiny_model("llama"))
    sequence = engine.start(tiny.tokens(40))
    assert sequence.bytes >= 40 * 2 * 40 * tiny.LAYERS * 4
    engine.release(sequence)
    engine.release(sequence)
    assert sequence.bytes == sequence.length == 0
    with pytest.raises(RequestError, match="released"):
        engine.forward([(sequence, TokenTree.root(1))])


def test_logits_outlive_the_engine(tiny_model) -> None:
    engine = native(tiny_model("llama"))
    logits = engine.forward([(engine.open(), TokenTree.root(3))])
    kept = logits.copy()
    del engine
    gc.collect()
    np.testing.assert_array_equal(logits, kept)


def test_nothing_is_asked_for(tiny_model) -> None:
    engine = native(tiny_model("llama"))
    assert engine.forward([]).shape == (0, tiny.VOCAB)
    none = engine.forward([(engine.open(), TokenTree.chain([3, 4]))], "none")
    assert none.shape == (0, tiny.VOCAB)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_logits_of_some_trees_only(weights: str, tiny_model) -> None:
    engine = native(tiny_model("llama"), format=weights)
    trees = [TokenTree.chain([3, 4, 5]), TokenTree.root(6), TokenTree.chain([7, 8])]
    batch = [(engine.open(), tree) for tree in trees]
    every = np.split(engine.forward(batch).copy(), [3, 4])
    for wanted in itertools.product([False, True], repeat=3):
        found = engine.forward(batch, wanted)
        kept = [rows for rows, want in zip(every, wanted, strict=True) if want]
        np.testing.assert_array_equal(found, np.concatenate([np.empty((0, tiny.VOCAB)), *kept]))
    engine.commit(batch[0][0], [0, 1])
    with pytest.raises(RequestError, match="2 trees, not 3"):
        engine.forward(batch, [True, False])


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (TokenTree.root(tiny.VOCAB), "token 67 is outside the vocabulary"),
        (TokenTree.chain([3, -5]), "token -5 is outside the vocabulary"),
        (TokenTree.chain([3] * (tiny.CONTEXT + 1)), "beyond the model's context"),
    ],
)
def test_bad_tokens_are_refused(tree: TokenTree, said: str, tiny_model) -> None:
    engine = native(tiny_model("llama"))
    good = engine.open()
    for sequence in (engine.open(), good):
        with pytest.raises(RequestError, match=said):
            engine.forward([(sequence, tree)])
    assert engine.forward([(good, TokenTree.root(3))]).shape == (1, tiny.VOCAB)


def test_bad_trees_are_refused_by_the_kernels_too(tiny_model) -> None:
    """Arrays that no TokenTree would hold."""
    model = native(tiny_model("gpt2"))._model
    tokens = np.array([3, 4, 5], np.int32)
    for parents in ([-1, 1, 0], [-1, 0, 2], [0, 0, 1], [-1, -1, 0], [-1, 0, -7]):
        with pytest.raises(ValueError, match="parent"):
            model.forward([(model.open(), tokens, np.array(parents, np.int32))], [True])
    with pytest.raises(ValueError, match="root"):
        model.forward([(model.open(), tokens[:0], tokens[:0])], [True])
    with pytest.raises(ValueError, match="differ in size"):
        model.forward([(model.open(), tokens, tokens[:2])], [True])
    with pytest.raises(ValueError, match="int32"):
        model.forward([(model.open(), tokens.astype(np.float64), tokens)], [True])


def test_sequences_are_kept_apart(tiny_model) -> None:
    engine, other = native(tiny_model("llama")), native(tiny_model("llama"))
    sequence = engine.open()
    with pytest.raises(RequestError, match="another engine"):
        other.forward([(sequence, TokenTree.root(3))])
    with pytest.raises(RequestError, match="twice"):
        engine.forward([(sequence, TokenTree.root(3)), (sequence, TokenTree.root(4))])
    foreign = ReferenceEngine(engine.config, tiny_model("llama").weights).open()
    for use in (engine.release, engine.fork, lambda s: engine.truncate(s, 0)):
        with pytest.raises(RequestError, match="another engine"):
            use(foreign)


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 1, 1], [0, 9], [-1], [[0]], [0, -1]])
def test_bad_paths_are_refused(path: list[int], tiny_model) -> None:
    engine = native(tiny_model("llama"))
    sequence = engine.open()
    engine.forward([(sequence, tree_of([3, 4, 5], [-1, 0, 1]))])
    with pytest.raises(RequestError, match="commit"):
        engine.commit(sequence, path)
    engine.commit(sequence, [0, 1])
    with pytest.raises(RequestError, match="no forward pass"):
        engine.commit(sequence, [0])
    for length in (3, -1, 2**70):
        with pytest.raises(RequestError, match="truncate"):
            engine.truncate(sequence, length)


def test_bad_weights_are_refused(tiny_model) -> None:
    model = tiny_model("llama")
    good = model.weights.to_arrays()
    spoiled = [
        ({k: v for k, v in good.items() if k != "layers.1.up"}, "'layers.1.up' is missing"),
        ({k: v for k, v in good.items() if k != "final_norm"}, "'final_norm' is missing"),
        ({**good, "layers.0.q": good["layers.0.q"][:, :-1]}, r"'layers.0.q' has shape \[40, 39\]"),
        ({**good, "layers.0.q": good["layers.0.q"][0]}, "'layers.0.q' has shape"),
        ({**good, "layers.9.q": good["layers.0.q"]}, "none of the 3 layers"),
        ({**good, "layers.x.q": good["layers.0.q"]}, "not part of a decoder"),
        ({**good, "extra": good["final_norm"]}, "'extra' is not part of this model"),
        ({**good, "embed": good["embed"][None]}, "3 axes"),
    ]
    for weights, said in spoiled:
        with pytest.raises(ModelError, match=said):
            NativeEngine(model.config, weights)


@pytest.mark.parametrize("name", ["olmo", "olmo2"])
def test_a_norm_that_the_model_lacks_is_refused(name: str, tiny_model) -> None:
    model = tiny_model(name)
    weights = model.weights.to_arrays() | {"layers.0.attn_norm": np.ones(40, np.float32)}
    with pytest.raises(ModelError, match=r"'layers\.0\.attn_norm' is not part of this model"):
        NativeEngine(model.config, weights)


def test_bad_settings_are_refused(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(MethodError, match="unknown format 'float7'"):
        native(model, format="float7")
    for text, said in (
        ("int4:head=int3", "unknown format of the head 'int3'"),
        ("int8:head=ternary", "unknown format of the head 'ternary'"),
        ("int8,", "not of the form"),
        ("int8,tail=fp32", "not of the form"),
    ):
        with pytest.raises(MethodError, match=said):
            native(model, format=text)
    with pytest.raises(MethodError, match="kv format 'bf16' is unknown"):
        native(model, kv_format="bf16")
    with pytest.raises(MethodError, match="'sse9' does not run here"):
        native(model, isa="sse9")
    for threads in (0, -3, 10**9):
        with pytest.raises(MethodError, match="threads"):
            native(model, threads=threads)
    monkeypatch.setenv("PACELINE_ISA", "mmx")
    with pytest.raises(MethodError, match="'mmx' does not run here"):
        native(model)
    monkeypatch.setenv("PACELINE_ISA", "portable")
    assert native(model).isa == "portable"
    monkeypatch.setenv("PACELINE_THREADS", "3")
    assert native(model).threads == default_threads() == 3
    monkeypatch.setenv("PACELINE_THREADS", "many")
    with pytest.raises(MethodError, match="PACELINE_THREADS is 'many'"):
        native(model)


def test_top_ranks_and_normalises() -> None:
    rng = np.random.default_rng(0)
    for vocabulary in (1, 5, 16, 37, 1000):
        logits = rng.normal(0, 3, (4, vocabulary)).astype(np.float32).round(1)
        k = min(8, vocabulary)
        tokens, probs = _native.top_k(logits, k)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(tokens, order)
        exact = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float64)
        exact /= exact.sum(1, keepdims=True)
        np.testing.assert_allclose(probs, np.take_along_axis(exact, order, 1), rtol=1e-5)
    with pytest.raises(ValueError, match="between 1 and V"):
        _native.top_k(logits, 2000)


def test_top_of_what_masks_allow() -> None:
    rng = np.random.default_rng(1)
    for vocabulary in (5, 37, 1000):
        logits = rng.normal(0, 3, (4, vocabulary)).astype(np.float32)
        allowed = rng.random((4, vocabulary)) < 0.4
        allowed[:, 3] = True
        padded = np.pad(allowed, ((0, 0), (0, -vocabulary % 32)))
        masks = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
        left = np.where(allowed, logits, np.float32(-np.inf))
        for got, expected in zip(
            _native.top_k(logits, 4, masks), _native.top_k(left, 4), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
        for wrong in (masks[:3], masks[:, :0]):
            with pytest.raises(ValueError, match="masks need V bits"):
                _native.top_k(logits, 4, np.ascontiguousarray(wrong))

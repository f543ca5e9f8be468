"""No argument of any kind ends the process: each call returns, or raises one clear exception."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.core import TokenTree
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope

CLEAR = (ValueError, TypeError, MemoryError, OverflowError, RuntimeError, AttributeError)
HUGE = (2**31, 2**40, 2**63 - 1, 2**63, 2**64, 2**80)
WHOLE = st.sampled_from((*range(-1, 9), 2**10, 2**16, *HUGE, -(2**63)))
NUMBERS = st.sampled_from(
    (
        0.0,
        0.5,
        1.0,
        -1.0,
        1e-30,
        1e30,
        1e300,
        float("nan"),
        float("inf"),
        float("-inf"),
        3,
        None,
        "1",
    )
)
DTYPES = (np.int32, np.int64, np.uint32, np.float32, np.float64, np.int8, np.bool_, ">i4", object)


@st.composite
def arrays(draw, axes=1, dtype=np.int32, low=-2, high=40):
    """An array that is mostly as it has to be."""
    sizes = st.sampled_from((0, 1, 2, 3, 7, 33))
    odd = draw(st.integers(0, 9)) == 0
    shape = tuple(draw(sizes) for _ in range(draw(st.integers(0, 3)) if odd else axes))
    dtype = draw(st.sampled_from(DTYPES)) if odd else dtype
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = random.integers(low, high, shape)
    if np.issubdtype(dtype, np.floating):
        values = values / 40
        if draw(st.integers(0, 4)) == 0 and values.size:
            values.flat[0] = draw(st.sampled_from((np.nan, np.inf, -np.inf, 1e38)))
    elif draw(st.integers(0, 4)) == 0 and values.size and dtype is np.int32:
        values.flat[-1] = draw(st.sampled_from((2**31 - 1, -(2**31))))
    array = values.astype(dtype)
    layout = draw(st.integers(0, 9))
    if layout == 0 and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]  # not contiguous
    if layout == 1 and array.ndim:
        return array[::-1]
    return array


TOKENS, FLOATS = arrays(), arrays(dtype=np.float32, low=0)
BITS = arrays(dtype=np.uint32, low=0)
ANYTHING = st.one_of(
    st.none(), WHOLE, NUMBERS, TOKENS, st.text(max_size=3), st.just([]), st.just(object())
)


def mostly(*strategies):
    """Positional arguments, one of which may be anything."""

    @st.composite
    def build(draw):
        odd = draw(st.integers(0, 4 * len(strategies)))
        return [draw(ANYTHING if i == odd else s) for i, s in enumerate(strategies)]

    return build()


def attempt(call, *arguments):
    """The result, or the exception that is clear enough for a user."""
    try:
        return call(*arguments)
    except CLEAR as error:
        if not str(error):
            raise
        return error


STEP = (
    TOKENS,
    TOKENS,
    arrays(low=-1, high=4),
    arrays(2),
    arrays(2, np.float32, 0),
    arrays(low=0, high=4),
    TOKENS,
    st.booleans(),
)
SMALL = st.sampled_from((0, 1, 2, 3, 8, 2**64, -1))
RATE = st.sampled_from((0.0, 0.1, 1.0, float("nan"), 2.0))
EXTEND = mostly(TOKENS, SMALL)
PROPOSE = mostly(TOKENS, WHOLE, NUMBERS)
OBSERVE = mostly(*STEP)
NOTHING = st.just([])
PIECES = st.one_of(st.sampled_from((b"", b"a", b"ab", b"\xff", b" ", b"a" * 5000)), st.binary())


@st.composite
def steps(draw):
    """The arrays of a step that fit each other."""
    n, k, s = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    parents = np.array([-1, *(random.integers(0, i) for i in range(1, n))], np.int32)
    probs = random.random((n, k), np.float32) / max(k, 1)
    if k and draw(st.booleans()):
        probs[0, 0] = draw(st.sampled_from((np.nan, -1.0, 1e30, 0.0)))
    path, drawn = np.sort(random.integers(0, n, 2)), random.integers(-3, 40, 2)
    whole = [
        random.integers(-3, 40, s),
        random.integers(-3, 40, n),
        parents,
        random.integers(-3, 40, (n, k)),
    ]
    ints = [array.astype(np.int32) for array in whole]
    return [*ints, probs, path.astype(np.int32), drawn.astype(np.int32), draw(st.booleans())]


MEMBERS = st.lists(
    st.tuples(SMALL, st.booleans(), TOKENS, arrays(low=-1, high=3), FLOATS), max_size=2
)
ALLOWED = st.sampled_from(
    (None, 3, lambda path: None, lambda path: 3, lambda path: np.full(2, 2**32 - 1, np.uint32))
)
BLEND = mostly(TOKENS, WHOLE, NUMBERS, MEMBERS, st.lists(WHOLE, max_size=3), ALLOWED)

TREES = st.lists(
    st.builds(
        SimpleNamespace,
        parents=st.one_of(arrays(low=-1, high=3), st.just(np.array([-1, 0, 0], np.int32))),
        scores=arrays(dtype=np.float32, low=0),
        origin=arrays(dtype=np.int16, high=3),
    ),
    max_size=2,
)
PATHS = st.lists(st.lists(st.sampled_from((0, 1, -1, 2**31, None)), max_size=3), max_size=2)

# Class -> its arguments, and the methods with theirs.
OBJECTS = {
    "ContextMixer": (
        mostly(SMALL, SMALL, SMALL, WHOLE, RATE, RATE),
        {"propose": PROPOSE, "observe": st.one_of(OBSERVE, steps()), "arrays": NOTHING},
    ),
    "NgramIndex": (
        mostly(SMALL, SMALL, WHOLE, RATE, RATE),
        {"begin": NOTHING, "extend": EXTEND, "propose": PROPOSE, "reliability": NOTHING},
    ),
    "SuffixMatcher": (
        mostly(WHOLE, SMALL, RATE),
        {
            "begin": NOTHING,
            "extend": EXTEND,
            "propose": PROPOSE,
            "replay": mostly(TOKENS, SMALL),
            "read": NOTHING,
            "fork": NOTHING,
        },
    ),
    "SourceBlend": (
        mostly(SMALL, SMALL, SMALL, WHOLE, RATE, RATE, WHOLE, SMALL, SMALL),
        {
            "begin": NOTHING,
            "propose": BLEND,
            "observe": st.one_of(OBSERVE, steps()),
            "fork": NOTHING,
        },
    ),
    "TokenTrie": (
        mostly(SMALL, SMALL, WHOLE, NUMBERS, RATE),
        {
            "begin": NOTHING,
            "extend": EXTEND,
            "propose": mostly(TOKENS, WHOLE),
            "load": mostly(TOKENS, arrays(low=0, high=3), FLOATS),
            "arrays": NOTHING,
        },
    ),
    "TrigramSearch": (
        mostly(SMALL, WHOLE, NUMBERS, SMALL, RATE, RATE),
        {"propose": mostly(TOKENS, WHOLE), "observe": st.one_of(OBSERVE, steps())},
    ),
    "CorpusMatcher": (
        mostly(TOKENS, arrays(low=0, high=7), SMALL, SMALL, WHOLE, RATE),
        {"begin": NOTHING, "extend": EXTEND, "propose": mostly(TOKENS, WHOLE)},
    ),
    "AcceptanceRates": (
        mostly(NUMBERS, NUMBERS),
        {
            "path_probs": mostly(st.one_of(TREES, st.just([TokenTree.root(1)]))),
            "learn": mostly(TREES, PATHS),
        },
    ),
    "CostCurve": (
        mostly(st.lists(NUMBERS, max_size=3), st.lists(NUMBERS, max_size=3)),
        {
            "at": mostly(NUMBERS),
            "each": mostly(arrays(dtype=np.float64)),
            "max_useful": mostly(WHOLE, SMALL),
            "marginal_seconds": mostly(SMALL),
            "correct": mostly(NUMBERS, NUMBERS),
        },
    ),
    "NodeRanking": (
        mostly(arrays(dtype=np.float64, low=0), st.lists(WHOLE, max_size=3)),
        {"keep": mostly(WHOLE), "best": mostly(NOTHING, WHOLE, NUMBERS)},
    ),
    "SentencePiece": (
        mostly(
            st.lists(st.one_of(PIECES, ANYTHING), max_size=3),
            FLOATS,
            arrays(dtype=np.uint8, low=0, high=2),
            WHOLE,
            st.booleans(),
        ),
        {"encode": mostly(PIECES), "find": mostly(PIECES)},
    ),
}
# Arguments with which the objects work.
USUAL = {
    "ContextMixer": (2, 1, 4, 64, 0.6, 0.1),
    "NgramIndex": (3, 2, 64, 0.5, 0.1),
    "SuffixMatcher": (16, 4, 0.1),
    "SourceBlend": (2, 1, 4, 64, 0.6, 0.1, 16, 4, 2),
    "TokenTrie": (3, 2, 16, 2.0, 0.1),
    "TrigramSearch": (4, 64, 1.0, 8, 0.5, 0.1),
    "CorpusMatcher": (np.array([1, 2, 1], np.int32), np.array([2, 0, 1], np.int32), 3, 2, 8, 0.1),
    "AcceptanceRates": (0.98, 0.5),
    "CostCurve": ([1.0, 2.0, 8.0], [1.0, 1.5, 3.0]),
    "NodeRanking": (np.ones(3), [1, 2]),
    "SentencePiece": ([b"a", b"b"], np.zeros(2, np.float32), np.array([0, 1], np.uint8), 0, True),
}


@pytest.mark.parametrize("name", OBJECTS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_objects_survive_any_arguments(name, data):
    made, methods = OBJECTS[name]
    cls = getattr(_native, name)
    one = cls(*USUAL[name]) if data.draw(st.booleans()) else attempt(cls, *data.draw(made))
    for method in data.draw(st.lists(st.sampled_from(sorted(methods)), max_size=12)):
        if isinstance(one, cls):
            attempt(getattr(one, method), *data.draw(methods[method]))
    if isinstance(one, cls) and hasattr(one, "reset"):
        one.reset()
        more = (0.0, [], [], None) if name == "SourceBlend" else ()
        tokens, *_ = one.propose(np.array([3], np.int32), 4, *more)
        assert tokens[0] == 3


FUNCTIONS = {
    "top_k": mostly(arrays(2, np.float32), SMALL, st.one_of(st.none(), arrays(2, np.uint32, 0))),
    "mask_logits": mostly(FLOATS, BITS),
    "contenders": mostly(FLOATS, WHOLE),
    "tournament": mostly(FLOATS, WHOLE, WHOLE),
    "suffix_array": mostly(TOKENS),
    "format_holds": mostly(
        st.sampled_from(("int4", "int8", "fp32", "x")),
        st.sampled_from((0, 1, 4, 8, 9, -1, 2**31)),
        arrays(2, np.float32),
        st.one_of(st.none(), arrays(2, np.uint16, 0)),
    ),
    "sparse_group": mostly(
        st.sampled_from((0, 1, 4, 8, 9, -1)),
        arrays(2, np.uint8, 0),
        arrays(2, np.float32),
        st.one_of(st.none(), arrays(2, np.uint16, 0)),
        arrays(low=0, high=3),
        st.sampled_from((0, 1, 2, 2**32, 2**40 + 1)),
    ),
    "read_bandwidth": mostly(st.sampled_from((0, 1, 2, -1, 2**40)), SMALL, SMALL),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_functions_survive_any_arguments(name, data):
    attempt(getattr(_native, name), *data.draw(FUNCTIONS[name]))


LAYERS = (LayerConfig(4, 2, 8, 24, None, Rope(1e4, 8)), LayerConfig(2, 1, 8, 24, 5, Rope(1e4, 8)))
CONFIG = ModelConfig("test", 37, 20, 96, LAYERS, "rms", 1e-5, "silu", True, 0.3, False)


def shapes(config):
    """The canonical names of a model's weights, with their shapes."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield from (("embed", (vocabulary, hidden)), ("head", (vocabulary, hidden)))
    yield "final_norm", (hidden,)
    for i, layer in enumerate(config.layers):
        queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden)}
        sizes |= {"o": (hidden, queries), "gate": (layer.intermediate, hidden)}
        sizes |= {"up": (layer.intermediate, hidden), "down": (hidden, layer.intermediate)}
        sizes |= {"attn_norm": (hidden,), "mlp_norm": (hidden,)}
        yield from ((f"layers.{i}.{name}", shape) for name, shape in sizes.items())


def loaded(storage="int8", kv_format="int8", threads=2):
    """A model of random weights."""
    model = _native.NativeModel(CONFIG, storage, storage, kv_format, "", threads)
    random = np.random.default_rng(0)
    for name, shape in shapes(CONFIG):
        model.set(name, random.standard_normal(shape).astype(np.float32))
    model.finish()
    cosines, sines = LAYERS[0].rope.table(0, CONFIG.context)
    model.extend_rope(0, cosines, sines)
    model.worth_waking = 0.0
    return model


CHAIN = (np.array([1, 2, 3], np.int32), np.array([-1, 0, 1], np.int32))
IDS, PARENTS = arrays(low=0, high=37), arrays(low=-1, high=3)
SORTED = st.one_of(st.none(), arrays(low=0, high=4), st.just(np.array([0, 1], np.int32)))


@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_the_engine_survives_any_arguments(data):
    model = loaded(data.draw(st.sampled_from(("fp32", "int8"))))
    sequences = [model.open()]
    calls = ("forward", "mixed", "commit", "truncate", "fork", "release", "limit", "rope", "get")
    calls += ("track", "evict", "rows", "attention_mass")
    for call in data.draw(st.lists(st.sampled_from(calls), max_size=12)):
        one = sequences[data.draw(st.integers(0, len(sequences) - 1))]
        if call == "forward":
            entry = data.draw(mostly(st.just(one), IDS, PARENTS))
            good = data.draw(st.booleans())
            view = [data.draw(SORTED) for _ in range(0 if good else 4)]
            batch = [(one, *CHAIN)] if good else [tuple(entry)]
            attempt(model.forward, batch, [data.draw(st.booleans())], *view)
            if good and data.draw(st.booleans()):
                attempt(one.commit, np.arange(3, dtype=np.int32))
        elif call == "mixed":
            arguments = mostly(st.just(one), arrays(2, low=0, high=37), arrays(2, np.float32))
            attempt(model.forward_mixed, *data.draw(arguments))
        elif call == "fork":
            made = attempt(one.fork)
            sequences += [made] if isinstance(made, _native.NativeSequence) else []
        elif call == "limit":
            attempt(model.set_page_limit, data.draw(st.one_of(st.none(), WHOLE)))
        elif call == "rope":
            attempt(model.extend_rope, *data.draw(mostly(WHOLE, *[arrays(2, np.float32)] * 2)))
        elif call == "get":
            attempt(model.get, data.draw(st.sampled_from(("embed", "layers.0.q", "x", ""))))
        elif call == "release":
            one.release()
        elif call == "track":
            attempt(one.track_attention)
        elif call == "evict":
            good = [np.zeros((layer.kv_heads, 1), np.int32) for layer in LAYERS]
            attempt(one.evict, data.draw(st.one_of(st.just(good), st.lists(arrays(2), max_size=2))))
        elif call in ("rows", "attention_mass"):
            attempt(getattr(one, call), *data.draw(mostly(WHOLE)))
        else:
            values = IDS if call == "commit" else WHOLE
            attempt(getattr(one, call), *data.draw(mostly(values)))
    model.set_page_limit(None)
    logits = model.forward([(model.open(), *CHAIN)], [True])
    assert logits.shape == (3, CONFIG.vocab_size)
    assert np.isfinite(logits).all()


BITS_OF = st.sampled_from((0, 1, 4, 8, 9, -1, 2**31, 2**40))
PACKED = st.one_of(
    mostly(
        BITS_OF,
        arrays(2, np.uint8, 0),
        arrays(2, np.float32),
        st.one_of(st.none(), arrays(2, np.uint16, 0)),
        IDS,
        st.one_of(st.none(), IDS),
    ),
    st.tuples(
        st.sampled_from((4, 8)),
        st.just(np.ones((37, 20), np.uint8)),
        st.just(np.ones((37, 1), np.float32)),
        st.none(),
        st.sampled_from((np.zeros(1, np.int32), np.ones(1, np.int32))),
        st.sampled_from((None, np.arange(20, dtype=np.int32), np.zeros(20, np.int32))),
    ),
)
NAMES = ("embed", "head", "layers.0.q", "layers.0.q.bias", "layers.1.down", "layers.9.q", "x", "")


@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_loading_survives_any_weights(data):
    storage = data.draw(st.sampled_from(("fp32", "bf16", "int8", "int4", "ternary", "int3")))
    model = attempt(_native.NativeModel, CONFIG, storage, "fp32", "fp16", "", 1)
    if isinstance(model, Exception):
        return
    known = dict(shapes(CONFIG))
    for name in data.draw(st.lists(st.sampled_from(NAMES), max_size=6)):
        shape = (
            known.get(name, (3, 4))
            if data.draw(st.booleans())
            else data.draw(st.lists(st.integers(0, 40), max_size=3).map(tuple))
        )
        weight = np.ones(shape, data.draw(st.sampled_from((*DTYPES, np.float16, np.uint16))))
        layout = data.draw(st.sampled_from(("plain", "reversed", "columns")))
        if layout == "reversed" and weight.ndim:
            weight = weight[::-1]
        elif layout == "columns":
            weight = np.asfortranarray(weight)
        attempt(model.set, name, weight, data.draw(st.booleans()))
        if data.draw(st.booleans()):
            attempt(model.set_format, name, data.draw(st.sampled_from(("int4", "fp16", "x", ""))))
        if data.draw(st.booleans()):
            attempt(model.load, name, *data.draw(PACKED))
    attempt(model.finish)
    attempt(model.forward, [(model.open(), *CHAIN)], [True])


def test_memory_that_is_no_file_is_not_given_back():
    """`mapped` promises a file: giving back other memory would empty it."""
    model = _native.NativeModel(CONFIG, "fp32", "fp32", "fp32", "", 1)
    around = np.full((1 << 20, CONFIG.hidden_size), 0.5, np.float32)
    weight = around[1000 : 1000 + CONFIG.vocab_size]
    model.set("embed", weight, True)
    model.set("head", around.T[:, : CONFIG.vocab_size].T, True)
    assert (around == 0.5).all()


def test_a_tree_that_grows_cannot_lose_its_texts():
    blend = _native.SourceBlend(2, 1, 4, 64, 0.6, 0.1, 16, 4, 0)
    text = np.array([1, 2, 3] * 4, np.int32)
    blend.suffix.extend(text, 0)
    seen = []

    def reset(path):
        for call in (blend.reset, blend.fork().reset, blend.suffix.reset):
            with pytest.raises(RuntimeError, match="grows"):
                call()
        blend.suffix.extend(np.arange(40, dtype=np.int32), 0)
        seen.append(path)

    tokens, *_ = blend.propose(text, 8, 0.0, [], [], reset)
    assert seen
    assert len(tokens) > 1
    blend.reset()


def test_an_exception_of_a_callback_leaves_the_blend_usable():
    blend = _native.SourceBlend(2, 1, 4, 64, 0.6, 0.1, 16, 4, 0)
    text = np.array([1, 2, 3] * 4, np.int32)

    def fail(path):
        raise KeyError("no")

    with pytest.raises(KeyError):
        blend.propose(text, 8, 0.0, [], [], fail)
    blend.reset()
    assert blend.propose(text, 8, 0.0, [], [], None)[0][0] == 3


def test_a_fork_survives_what_the_other_replays():
    one = _native.SuffixMatcher(64, 4, 0.1)
    one.extend(np.arange(30, dtype=np.int32), 0)
    other = one.fork()
    one.replay(np.array([1, 2, -1, 3], np.int32), 2)
    other.extend(np.arange(40, dtype=np.int32), 0)
    tokens, *_ = other.propose(np.arange(40, dtype=np.int32), 8)
    assert tokens[0] == 39


def test_arrays_of_a_trie_outlive_its_growth():
    trie = _native.TokenTrie(3, 2, 1 << 12, 2.0, 0.1)
    trie.extend(np.array([1, 2, 3], np.int32), 0)
    arrays_ = trie.arrays()
    before = {name: array.copy() for name, array in arrays_.items() if name != "reliability"}
    trie.extend(np.arange(1000, dtype=np.int32), 1 << 20)
    for name, array in before.items():
        assert (arrays_[name] == array).all()


def test_threads_that_release_and_load_meanwhile_do_no_harm():
    """A pass reads copies, and a sequence that is released meanwhile is refused."""
    model, failures = loaded(), []
    sequences = [model.open() for _ in range(4)]
    tokens, parents = (array.copy() for array in CHAIN)

    def run():
        for _ in range(100):
            batch = [(one, tokens, parents) for one in sequences]
            result = attempt(model.forward, batch, [True] * 4)
            if not isinstance(result, np.ndarray) and "released" not in str(result):
                failures.append(result)

    def disturb():
        for i in range(200):
            tokens[i % 3] = i % 37
            attempt(sequences[i % 4].release)
            sequences[i % 4] = model.open()
            attempt(model.get, "embed")
            attempt(lambda: model.rope_positions)

    threads = [threading.Thread(target=run), threading.Thread(target=disturb)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Made(Sequence):
    """A sequence whose items are made when they are asked for."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return TokenTree.root(index if index < 50 else [][index])


def test_trees_that_nobody_else_holds_are_read():
    assert (_native.AcceptanceRates(0.98, 0.5).path_probs(Made()) == 1.0).all()

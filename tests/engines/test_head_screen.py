"""The head read in part: draws of the whole head, bit for bit, whatever states and weights are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.control.min_p import MinP
from paceline.control.repetition_penalty import RepetitionPenalty
from paceline.control.temperature import Temperature
from paceline.control.top_k import TopK
from paceline.control.top_p import TopP
from paceline.core import Request, TokenTree
from paceline.decoding.screened_walk import can_screen, draw_screened
from paceline.decoding.walk import draw
from paceline.engines.formats import with_activations
from paceline.engines.head_screen import HeadScreen
from paceline.engines.native import NativeEngine
from paceline.engines.screened import ScreenedLogits
from paceline.errors import MethodError, RequestError
from paceline.models.config import LayerConfig, ModelConfig
from tests.engines.test_block_formats import blocks

VOCAB = 611  # no multiple of sixteen
FORMATS = ("fp32", "bf16", "fp16", "int8", "int8_fp16", "q8_0", "q6_k")
BYTES = ("q8_0", "q6_k")  # multiplied with activations of 8 bits, too
HOSTILE = ("equal rows", "zero rows", "outliers", "scales", "aligned", "ties")


def config(hidden: int) -> ModelConfig:
    layer = LayerConfig(1, 1, 16, 16, None, None)
    return ModelConfig("test", VOCAB, hidden, 64, (layer,), "rms", 1e-6, "silu", False, 0.25, False)


def head_of(random, hidden: int, kind: str) -> np.ndarray:
    """Rows of a head that are hard to tell apart, or to bound."""
    head = random.standard_normal((VOCAB, hidden)).astype(np.float32)
    if kind == "equal rows":
        head = head[random.integers(0, 5, VOCAB)]
    elif kind == "zero rows":
        head[random.random(VOCAB) < 0.6] = 0
        head[:, : hidden // 2] = 0
    elif kind == "outliers":
        head[:, random.integers(0, hidden, 3)] *= 300
        head[random.integers(0, VOCAB, 3)] *= 50
    elif kind == "scales":
        head *= 10.0 ** random.uniform(-6, 3, (VOCAB, 1)).astype(np.float32)
        head *= 10.0 ** random.uniform(-5, 0, (1, hidden)).astype(np.float32)
    elif kind == "aligned":  # every weight half a step from a code, all towards one state
        head = np.rint(head * 2) / 2 + 0.2499 * np.sign(random.standard_normal(hidden))
        head[:, ::32] = 4.0
    elif kind == "ties":
        head = np.rint(head)
        head[random.integers(0, VOCAB, 200)] = head[0]
    return head.astype(np.float32)


def engine_of(
    seed: int, kind: str, form: str, scale: float = 1.0, isa: str = "", narrow: bool = False
) -> NativeEngine:
    """A model whose layers do nothing: a token's state is its embedding, normed."""
    random = np.random.default_rng(seed)
    hidden = 256 if form == "q6_k" else int(random.choice([32, 64, 160]))
    head = head_of(random, hidden, kind)
    states = random.standard_normal((VOCAB, hidden)).astype(np.float32)
    states[: VOCAB // 2] = head[: VOCAB // 2]  # aligned with rows
    states[1::7] = np.sign(states[1::7])
    states[2::7, 1:] *= 1e-4
    states[3] = 0
    norm = np.full(hidden, scale, np.float32)
    norm[random.integers(0, hidden)] *= 40
    weights = {
        "embed": states,
        "final_norm": norm,
        "head": blocks(random, form.upper(), VOCAB, hidden) if form[0] == "q" else head,
    }
    zero = {name: np.zeros((hidden, 16), np.float32) for name in ("o", "down")}
    zero |= {name: np.zeros((16, hidden), np.float32) for name in ("q", "k", "v", "up")}
    weights |= {f"layers.0.{name}": value for name, value in zero.items()}
    for name in ("attn_norm", "mlp_norm"):
        weights[f"layers.0.{name}"] = np.ones(hidden, np.float32)
    stored = "auto" if form[0] == "q" else f"fp32:head={form}"
    stored = with_activations(stored, "int8" if narrow else "int16")
    engine = NativeEngine(config(hidden), weights, format=stored, threads=2, isa=isa)
    engine._model.worth_waking = 0
    return engine


def star(tokens) -> TokenTree:
    n = len(tokens)
    return TokenTree(
        np.array(tokens, np.int32),
        np.array([-1] + [0] * (n - 1), np.int32),
        np.ones(n, np.float32),
        np.zeros(n, np.int16),
    )


def both(engine: NativeEngine, tree: TokenTree) -> tuple[np.ndarray, ScreenedLogits]:
    """The logits of the whole head, and the screened ones."""
    sequence = engine.open()
    logits = engine.forward([(sequence, tree)]).copy()
    inner = engine._model.forward_screened([(sequence, tree.tokens, tree.parents)], [True])
    return logits, ScreenedLogits(inner, 0, len(tree))


def request_of(temperature: float, seed: int, *controls) -> Request:
    scaling = (Temperature(temperature),) if temperature else ()
    return Request((1,), 5, temperature=temperature, seed=seed, controls=(*scaling, *controls))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(("random", *HOSTILE)),
    form=st.sampled_from(FORMATS),
    scale=st.sampled_from([1.0, 1e-3, 30.0, 1e6]),
    isa=st.sampled_from(_native.isas()),
    nodes=st.integers(1, 19),
    narrow=st.booleans(),
)
def test_bounds_hold_and_draws_are_those_of_the_whole_head(
    seed, kind, form, scale, isa, nodes, narrow
):
    engine = engine_of(seed, kind, form, scale, isa, narrow and form in BYTES)
    if not engine._model.make_screen():
        assert kind == "scales"  # numbers that leave no room for bounds
        return
    random = np.random.default_rng(seed + 1)
    logits, screened = both(engine, star(random.choice(VOCAB, nodes, replace=False)))
    bounds = screened._inner.bounds
    assert (np.abs(screened.values.astype(np.float64) - logits) <= bounds).all()
    for node in range(nodes):
        temperature = float(random.choice([0, 0, 0.001, 0.3, 1, 1, 3, 1000]))
        request = request_of(temperature, seed)
        expected, _ = draw(logits[node], [5] * node, request)
        assert draw_screened(screened, node, [5] * node, request) in (None, expected)
    for node in range(nodes):
        found = screened.contenders(node, 1.0, None)
        if found is not None:
            assert found[1].tobytes() == logits[node][found[0]].tobytes()
        assert screened.row(node).tobytes() == logits[node].tobytes()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(("random", "outliers", "ties", "equal rows")),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
    truncating=st.lists(
        st.sampled_from([TopK(1), TopK(3), TopK(40), TopP(0.3), TopP(0.95), TopP(1), MinP(0.2)]),
        max_size=3,
        unique_by=type,
    ),
)
def test_truncated_draws_are_those_of_the_whole_head(seed, kind, temperature, truncating):
    engine = engine_of(seed, kind, "int8")
    assert engine._model.make_screen()
    tokens = np.random.default_rng(seed).choice(VOCAB, 9, replace=False)
    logits, screened = both(engine, star(tokens))
    controls = sorted(truncating, key=lambda control: control.order)
    request = request_of(temperature, seed, *controls)
    assert can_screen(request)
    for node in range(len(tokens)):
        expected, _ = draw(logits[node], [5] * node, request)
        assert draw_screened(screened, node, [5] * node, request) in (None, expected)


def test_few_rows_are_read_where_one_token_stands_out():
    random = np.random.default_rng(0)
    engine = engine_of(0, "random", "int8")
    assert engine._model.make_screen()
    tokens = random.permutation(VOCAB // 2)[:12]  # states that are rows of the head
    tokens = [int(t) for t in tokens if t % 7 not in (1, 2)]
    logits, screened = both(engine, star(tokens))
    for node in range(len(tokens)):
        found = screened.contenders(node, 1.0, None)
        assert found is not None
        assert logits[node].argmax() in found[0]
    assert screened._inner.panels_read < 0.5 * len(tokens) * engine._model.head_panels


def test_coarse_logits_do_not_depend_on_the_pass():
    engine = engine_of(3, "outliers", "bf16")
    assert engine._model.make_screen()
    tokens = np.arange(21)
    _, screened = both(engine, star(tokens))
    together = screened.values.copy(), screened._inner.bounds
    engine.threads = 1
    for node in (0, 7, 20):
        _, alone = both(engine, star(tokens[node : node + 1]))
        assert alone.values[0].tobytes() == together[0][node].tobytes()
        assert alone._inner.bounds[0].tobytes() == together[1][node].tobytes()


def test_tokens_above_a_logit_are_found():
    engine = engine_of(8, "random", "int8")
    assert engine._model.make_screen()
    logits, screened = both(engine, star([4, 9]))
    for rank in (0, 2):
        least = np.sort(logits[1])[-1 - rank]
        found = screened.at_least(1, float(least))
        assert found is not None
        assert found[0].tolist() == np.flatnonzero(logits[1] >= least).tolist()
        assert found[1].tobytes() == logits[1][found[0]].tobytes()


@pytest.mark.parametrize("scale", [1e16, 1e-18])
def test_states_without_bounds_get_the_whole_head(scale):
    engine = engine_of(5, "random", "fp32", scale)
    assert engine._model.make_screen()
    logits, screened = both(engine, star([4, 9]))
    assert screened.contenders(1, 1.0, None) is None
    assert screened.row(1).tobytes() == logits[1].tobytes()


def test_a_later_pass_ends_screened_logits():
    engine = engine_of(1, "random", "int8")
    assert engine._model.make_screen()
    _, screened = both(engine, star([1, 2]))
    engine.forward([(engine.open(), star([3]))])
    with pytest.raises(ValueError, match="later pass"):
        screened.contenders(0, 1.0, None)


def test_rows_outside_the_pass_and_bad_rules_are_refused():
    engine = engine_of(1, "random", "int8")
    with pytest.raises(ValueError, match="no coarse head"):
        engine._model.forward_screened(
            [(engine.open(), np.zeros(1, "i4"), -np.ones(1, "i4"))], [True]
        )
    assert engine._model.make_screen()
    _, screened = both(engine, star([1, 2]))
    wrong = "row .* outside|temperature"
    for arguments in ((2, 1.0, None), (-1, 1.0, None), (0, 0.0, None)):
        with pytest.raises(ValueError, match=wrong):
            screened.contenders(*arguments)


def test_heads_of_few_bits_are_not_copied():
    engine = engine_of(1, "random", "int4")
    assert not engine._model.make_screen()


def test_other_controls_and_walks_need_the_whole_head():
    assert can_screen(request_of(0.7, 1, TopK(5), TopP(0.9), MinP(0.1)))
    assert not can_screen(request_of(0.7, 1, RepetitionPenalty(1.2)))
    assert not can_screen(Request((1,), 5, temperature=0.5, walk="rejection"))


def screening(engine: NativeEngine, mode: str) -> HeadScreen:
    engine.head_screen = HeadScreen(engine._model, mode)
    return engine.head_screen


def test_an_engine_screens_once_that_can_pay():
    engine = engine_of(1, "random", "int8")
    sequence = engine.open()
    batch = [(sequence, star([1, 2]))]
    assert engine.head_screen.state == "off"  # the head is small
    assert isinstance(engine.forward_screened(batch), np.ndarray)
    screen = screening(engine, "auto")
    screen._off = False
    for _ in range(HeadScreen.FIRST):
        assert screen.state == "waiting"
        assert isinstance(engine.forward_screened(batch), np.ndarray)
    assert isinstance(engine.forward_screened(batch), ScreenedLogits)
    assert screen.state == "on"
    assert screen.bytes
    assert isinstance(engine.forward_screened(batch, "none"), np.ndarray)


def test_screening_that_does_not_pay_rests_and_ends():
    engine = engine_of(2, "equal rows", "int8")  # no token stands out
    screen = screening(engine, "auto")
    screen._off, passes = False, 0
    batch = [(engine.open(), star([1, 2]))]
    while screen.state != "off":
        logits = engine.forward_screened(batch)
        if isinstance(logits, ScreenedLogits):
            passes += 1
            logits.row(0)
        assert passes <= HeadScreen.TRIAL * HeadScreen.TRIALS
    assert not screen.bytes
    assert screen.share > 1


def test_modes_of_screening(monkeypatch):
    engine = engine_of(1, "random", "int8")
    assert isinstance(engine.forward_screened([(engine.open(), star([1]))]), np.ndarray)
    screening(engine, "on")
    assert isinstance(engine.forward_screened([(engine.open(), star([1]))]), ScreenedLogits)
    monkeypatch.setenv("PACELINE_HEAD_SCREEN", "off")
    assert HeadScreen(engine._model).state == "off"
    monkeypatch.setenv("PACELINE_HEAD_SCREEN", "never")
    with pytest.raises(MethodError, match="PACELINE_HEAD_SCREEN is 'never'"):
        HeadScreen(engine._model)


def test_bad_passes_are_refused_as_others_are():
    engine = engine_of(1, "random", "int8")
    screening(engine, "on")
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.forward_screened([(engine.open(), star([VOCAB]))])

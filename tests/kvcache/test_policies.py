"""What each policy keeps, when it acts, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from paceline.abilities import Ability
from paceline.core import Exactness, Request
from paceline.decoding.session import Session
from paceline.drafters.base import Target
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, RequestError
from paceline.kvcache.adakv import AdaKV
from paceline.kvcache.base import LayerCache, ScoringPolicy, parse_policy
from paceline.kvcache.fastgen import FastGen
from paceline.kvcache.h2o import H2O
from paceline.kvcache.light_transfer import LightTransfer
from paceline.kvcache.retrieval_heads import RetrievalHeads, retrieval_ranks
from paceline.kvcache.sirllm import SirLLM
from paceline.kvcache.sliding_window import SlidingWindow
from paceline.kvcache.zipvl import ZipVL
from paceline.registry import drafters, kv_policies, patterns
from tests.engines.test_attention import CONFIG, WEIGHTS
from tests.engines.test_eviction import ENGINES, LAYERS
from tests.toy import ToyEngine

ADAPTIVE = (AdaKV, FastGen, LightTransfer, RetrievalHeads, ZipVL)
EXAMPLES = [example for kind in kv_policies.methods().values() for example in kind.examples]


def cache(positions, length: int, mass=None) -> LayerCache:
    return LayerCache(0, 1, length, np.array(positions, np.int32), mass)


def test_every_policy_is_lossy_and_has_examples() -> None:
    for name, kind in kv_policies.methods().items():
        assert kind.exactness is Exactness.LOSSY, name
        assert kind.examples, name


def test_a_sliding_window_keeps_sinks_and_the_end() -> None:
    policy = SlidingWindow(budget=5, sinks=2)
    kept = policy.keep(cache([[0, 1, 4, 5, 6, 7, 8, 9]] * 2, 10))
    assert kept.tolist() == [[0, 1, 5, 6, 7]] * 2


def test_h2o_keeps_what_was_attended_to_and_the_end_in_each_head() -> None:
    mass = np.array([[5.0, 1.0, 9.0, 2.0, 0.0, 0.0], [0.0, 7.0, 1.0, 8.0, 9.0, 0.0]])
    policy = H2O(budget=4, recent=2)
    kept = policy.keep(cache([[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5, 6]], 7, mass))
    assert kept.tolist() == [[0, 2, 3, 5], [1, 3, 4, 5]]  # positions 5 and 6 are the recent ones
    equal = policy.keep(cache([[0, 1, 2, 3, 4, 5]], 6, np.ones((1, 6))))
    assert equal.tolist() == [[0, 1, 4, 5]], "of equals the earlier stays"


def test_rows_that_a_window_hides_for_good_are_kept_last() -> None:
    window = CONFIG.layers[1].window
    assert window is not None
    length = window + 10
    mass = np.arange(length, 0.0, -1)[None]  # the oldest received most
    layer = LayerCache(1, 3, length, np.arange(length, dtype=np.int32)[None], mass, config=CONFIG)
    kept = H2O(budget=8, recent=2).keep(layer)
    # Position 11 is the first that the next one sees.
    assert kept.tolist() == [[*range(11, 17), length - 2, length - 1]]
    roomy = H2O(budget=window + 3, recent=2).keep(layer)
    assert roomy.tolist() == [[0, 1, 2, 3, *range(11, length)]]
    far = replace(layer, index=0)
    assert far.shape.window is None
    assert H2O(budget=8, recent=2).keep(far).tolist() == [[*range(6), length - 2, length - 1]]


@given(st.data())
def test_a_scoring_policy_keeps_its_budget_in_order(data) -> None:
    budget = data.draw(st.integers(1, 20))
    sinks = data.draw(st.integers(0, budget))
    recent = data.draw(st.integers(0, budget - sinks))
    length = data.draw(st.integers(budget + 1, 60))
    held = data.draw(st.integers(budget + 1, length))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    positions = np.sort([rng.choice(length, held, replace=False) for _ in range(3)], 1)
    mass = rng.random((3, held))
    kept = H2O(budget, sinks, recent=recent).keep(cache(positions, length, mass))
    assert kept.shape == (3, budget)
    assert kept.dtype == np.int32
    assert (np.diff(kept, axis=1) > 0).all()
    for own, rows, scores in zip(positions, kept, mass, strict=True):
        must = (own < sinks) | (own >= length - recent)
        assert set(np.flatnonzero(must)) <= set(rows)
        dropped = np.setdiff1d(np.arange(held), rows)
        chosen = [row for row in rows if not must[row]]
        assert not chosen or scores[dropped].max() <= scores[chosen].min()


@ENGINES
@pytest.mark.parametrize("spec", EXAMPLES)
def test_a_policy_acts_at_multiples_only_and_bounds_memory(create, spec: str) -> None:
    engine, policy = create(), parse_policy(spec)
    sequence = engine.open()
    policy.begin(engine, sequence)
    text = tiny.tokens(min(engine.config.context, policy.budget + 3 * policy.every))
    acted, peak = [], 0
    while sequence.length < len(text):
        end = sequence.length + min(policy.distance(sequence.length), 5)
        engine.extend(sequence, text[sequence.length : end])
        peak = max(peak, engine.row_count(sequence))
        if policy.act(engine, sequence):
            acted.append(sequence.length)
            assert engine.row_count(sequence) <= policy.max_rows(sequence.length)
            if not isinstance(policy, ADAPTIVE):
                assert engine.row_count(sequence) == policy.budget
    assert peak <= policy.max_rows(len(text))
    wanted = [n for n in range(1, len(text) + 1) if n % policy.every == 0 and n > policy.budget]
    if isinstance(policy, ZipVL):
        assert acted[:1] == wanted[:1]
        assert set(acted) <= set(wanted)
    else:
        assert acted == wanted
    for index in LAYERS:
        rows = engine.rows(sequence, index)
        for row in rows:
            own = row[row >= 0]
            assert (np.diff(own) > 0).all()
            assert (own[: policy.sinks] == np.arange(policy.sinks)).all()
            assert own[-1] == len(text) - 1


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("h20", "unknown kv policy 'h20'; did you mean h2o"),
        ("h2o:budget=0", "budget is 0"),
        ("h2o:every=0", "every is 0"),
        ("h2o:budget=8,recent=9", "recent is 9, expected 0 to 8"),
        ("sliding_window:sinks=5,budget=4", "sinks is 5"),
        ("sliding_window:recent=5", "unknown setting of sliding_window 'recent'"),
    ],
)
def test_mistakes_are_named(spec: str, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        parse_policy(spec)


def session(engine, spec: str, drafter: str = "plain", **request) -> Session:
    method = drafters.parse(drafter).build(Target(engine.config.vocab_size, engine))
    return Session(engine, method, Request((1, 2), 4, kv_policy=parse_policy(spec), **request))


@ENGINES
def test_what_does_not_go_together_is_refused_by_name(create) -> None:
    engine = create()
    with pytest.raises(MethodError, match=r"KV policy h2o and the drafter sparse_kv do not"):
        session(engine, "h2o", "sparse_kv")
    with pytest.raises(MethodError, match=r"KV policy h2o and the engine toy do not go"):
        session(ToyEngine(), "h2o")
    patterned = ReferenceEngine(CONFIG, WEIGHTS, pattern=patterns.parse("lm_infinite"))
    with pytest.raises(MethodError, match=r"h2o and the attention pattern lm_infinite do not"):
        session(patterned, "h2o")
    with pytest.raises(RequestError, match="attention pattern lm_infinite"):
        patterned.evict(patterned.start(tiny.tokens(3)), [np.arange(1)] * 3)
    found = session(engine, "h2o")
    with pytest.raises(RequestError, match="h2o starts with an empty cache"):
        found.open(engine.start(tiny.tokens(3)))


def test_a_policy_that_scores_wrongly_or_reads_what_it_did_not_ask_for_is_named() -> None:
    @dataclass(frozen=True)
    class Wrong(ScoringPolicy):
        name = "wrong"
        needs = frozenset({Ability.EVICT})
        by_mass: bool = False

        def score(self, layer):
            return layer.attention_mass if self.by_mass else np.zeros(3)

    layer = cache([[0, 1, 2, 3]], 4)
    with pytest.raises(MethodError, match=r"wrong scored \[3\] rows, expected \[1, 4\]"):
        Wrong(budget=2, sinks=0, recent=0).keep(layer)
    with pytest.raises(MethodError, match="its needs do not name"):
        Wrong(budget=2, sinks=0, recent=0, by_mass=True).keep(layer)


def test_surprising_tokens_stay_and_fade() -> None:
    surprisal = np.array([0.0, 3.0, 2.0, 1.9, 1.8, 0.1, 0.2])
    layer = replace(cache([[0, 1, 2, 3, 4, 5, 6]], 7), surprisal=surprisal)
    kept = SirLLM(budget=4, sinks=1, recent=1).keep(layer)
    assert kept.tolist() == [[0, 1, 2, 6]]
    fading = SirLLM(budget=4, sinks=1, recent=1, decay=1e-300).keep(layer)
    assert fading.tolist() == [[0, 3, 4, 6]]
    held = replace(cache([[0, 1, 3, 5, 6]], 7), surprisal=surprisal)
    assert SirLLM(budget=4, sinks=1, recent=1).score(held).tolist() == [[0.0, 3.0, 1.9, 0.1, 0.2]]


def layer_of(index: int, queries, keys, positions=None) -> LayerCache:
    """A layer with given queries [H, W, D] and keys [H_kv, S, D]."""
    length = keys.shape[1]
    rows = np.tile(np.arange(length, dtype=np.int32), (len(keys), 1))
    return LayerCache(
        index,
        len(CONFIG.layers),
        length,
        rows if positions is None else positions,
        keys=keys.astype(np.float32),
        queries=queries.astype(np.float32),
        config=CONFIG,
    )


def looking_at(index: int, targets, length: int, window: int) -> LayerCache:
    """A layer each of whose KV heads attends to one set of positions, or to all with None."""
    shape = CONFIG.layers[index]
    keys = np.zeros((shape.kv_heads, length, shape.head_dim))
    for head, target in enumerate(targets):
        if target is not None:
            keys[head, target, 0] = 40.0
    queries = np.zeros((shape.heads, window, shape.head_dim))
    queries[:, :, 0] = 1.0
    return layer_of(index, queries, keys)


def test_each_head_takes_the_cheapest_choice_that_recovers_its_attention() -> None:
    index = next(i for i in LAYERS if CONFIG.layers[i].kv_heads >= 2)
    policy = FastGen(budget=12, sinks=2, window=4, every=8)
    for targets, sizes in (
        (([0], range(16)), (2, 16)),
        (([12, 13, 14, 15], [0, 5]), (6, 12)),
    ):
        kept = policy.keep(looking_at(index, targets, 16, 4))
        assert [(own >= 0).sum() for own in kept] == list(sizes)
    assert 5 in kept[1]


def test_choices_stay() -> None:
    index = next(i for i in LAYERS if CONFIG.layers[i].kv_heads >= 2)
    policy = FastGen(budget=12, sinks=2, window=4, every=8)
    later = looking_at(index, ([0], [0]), 24, 4)
    rows = [[-1] * 14 + [0, 1, *range(16, 24)], list(range(24))]
    kept = policy.keep(replace(later, positions=np.array(rows, np.int32)))
    assert [(own >= 0).sum() for own in kept] == [2, 24], "all was chosen where all could be seen"


def test_lazy_layers_alone_lose_rows() -> None:
    shown = [([0], [0]), ([7], [7]), ([15], [15])]  # the middle layer looks at neither end
    layers = [looking_at(i, shown[i][: CONFIG.layers[i].kv_heads], 16, 1) for i in LAYERS]
    policy = LightTransfer(budget=6, sinks=2, window=1, lazy=2 / 3)
    kept = policy.choose(layers)
    assert [own.shape[1] for own in kept] == [6, 16, 6]
    assert kept[0][0].tolist() == [0, 1, 12, 13, 14, 15]
    full = LightTransfer(budget=6, sinks=2, window=1, lazy=0.0).choose(layers)
    assert [own.shape[1] for own in full] == [16, 16, 16]


def test_concentrated_layers_keep_few_rows() -> None:
    policy = ZipVL(budget=12, sinks=1, recent=2, window=4)
    narrow = policy.keep(looking_at(0, [[5], [5]], 16, 4))
    assert narrow[0].tolist() == [0, 5, 14, 15]
    assert policy.keep(looking_at(0, [None, None], 16, 4)).shape[1] == 12


def test_heads_share_a_budget_by_their_scores() -> None:
    mass = np.array([[9.0, 8.0, 7.0, 6.0, 5.0, 0.0], [4.0, 3.0, 2.0, 1.0, 0.5, 0.0]])
    layer = cache([[0, 1, 2, 3, 4, 5]] * 2, 6, mass)
    policy = AdaKV(budget=3, sinks=0, recent=1, of="h2o", own=0.4)
    assert policy.required == H2O.needs
    assert policy.keep(layer).tolist() == [[0, 1, 2, 3, 5], [-1, -1, -1, -1, 5]]
    assert AdaKV(budget=3, sinks=0, recent=1, of="h2o", own=1.0).keep(layer).shape == (2, 3)
    capped = AdaKV(budget=3, sinks=0, recent=1, of="h2o", own=0.0, most=1.0).keep(layer)
    assert (capped >= 0).sum(1).max() == 3
    for of in ("h20", "sliding_window", "adakv", ""):
        with pytest.raises(MethodError):
            AdaKV(of=of)


@ENGINES
def test_retrieval_heads_keep_all_in_the_order_of_their_rank(create) -> None:
    engine = create()
    ranks = [tuple(rank) for rank in retrieval_ranks(engine)]
    total = sum(layer.kv_heads for layer in CONFIG.layers)
    assert len(set(ranks)) == len(ranks) == total
    policy = RetrievalHeads(budget=40, sinks=2, recent=8, every=20)
    sequence, sizes = engine.open(), []
    policy.begin(engine, sequence)
    for _ in range(6):
        engine.extend(sequence, tiny.tokens(20))
        policy.act(engine, sequence)
        rows = [(engine.rows(sequence, index) >= 0).sum(1) for index in LAYERS]
        sizes.append([rows[layer][head] for layer, head in ranks])
        assert sum(sizes[-1]) <= max(40, 10) * total
    assert sizes[0] == [20] * total
    assert sizes[-1][0] > 40 >= sizes[-1][-1]
    engine.release(sequence)

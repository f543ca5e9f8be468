"""Every guide in every search, against the same search of a model that is guided by definition."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.beam import Beam
from paceline.decoding.strategies.best_of import BestOf
from paceline.decoding.strategies.contrastive import ContrastiveSearch
from paceline.decoding.strategies.diverse import DiverseBeam
from paceline.decoding.strategies.lattice import LatticeSearch
from paceline.decoding.strategies.planning import Planning
from paceline.decoding.text_stream import TextStream
from paceline.engines import open_engine
from paceline.errors import MethodError
from paceline.models import load
from paceline.registry import guides, strategies
from tests.conftest import shared
from tests.control.guides.beside_toy import Other
from tests.control.guides.laws import LAWS, SPECS, Models, Recomputed, cleangen_when_greedy
from tests.decoding.test_loop import Root
from tests.decoding.test_text_stream import Letters
from tests.toy import Oracle, ToyEngine


def reward(text):
    """Of a text; anything but the model's taste."""
    return sum(map(ord, text)) * 37 % 101 / 102


SEARCHES = {
    "beam": Beam(width=3, returned=3),
    "diverse": DiverseBeam(width=4, groups=2, returned=4, penalty=1.0),
    "lattice": LatticeSearch(nodes=30, width=3, suffix=2, least=0.0, returned=4),
    "contrastive": ContrastiveSearch(k=3, penalty=0.4),
    "planning": Planning(rollouts=6, k=3, returned=3, reward=reward),
}
TOYS = [name for name in LAWS if name != "dola"]
LIMIT = 7


class Thinking(ToyEngine):
    """Has hidden states."""

    abilities = frozenset({"hidden"})

    def __init__(self, **options):
        super().__init__(**options)
        self.config = replace(self.config, hidden_size=8)

    def logits_after(self, tokens):
        self.states.append(np.random.default_rng([9, *tokens[-4:]]).normal(0, 1, 8).astype("f4"))
        return super().logits_after(tokens)

    def forward(self, batch, rows="all", view=None):
        self.states = []
        return super().forward(batch, rows, view)

    def hidden(self):
        return np.stack(self.states)


def toys(kind=Thinking):
    return Models({"a": kind(order=64), "b": Other(1, order=64), "c": Other(2)})


def searched(search, engine, request):
    return search.run(Task(engine, request, lambda: TextStream(Letters())))


def assert_same(found, expected):
    assert [output.tokens for output in found] == [output.tokens for output in expected]
    assert [output.finish for output in found] == [output.finish for output in expected]
    scores = [[output.score for output in outputs] for outputs in (found, expected)]
    np.testing.assert_allclose(*scores, atol=2e-4)


def expected_of(search, models, names, prompt, limit=LIMIT, **options):
    """The same search of a model that is guided by definition."""
    engine = Recomputed(models, [LAWS[name] for name in names], len(prompt))
    if isinstance(search, Planning) and names == ["cleangen"]:
        # What is tried has the law's chances; how it goes on is the paper's rule.
        engine.laws_of_forks = [cleangen_when_greedy]
    return searched(search, engine, Request(tuple(prompt), limit, **options))


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("kind", SEARCHES)
def test_a_guided_search_is_the_search_of_the_guided_model(kind, name):
    search, changed = SEARCHES[kind], False
    for prompt in ([7, 7], [4, 5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5]):
        models, ends = toys(), {"stop_tokens": frozenset({2})}
        request = models.request([name], prompt, LIMIT, **ends)
        if search.revisits and name == "adaptive":
            with pytest.raises(
                MethodError, match=r"the guide cfg with stop and the strategy .* leave stop out"
            ):
                searched(search, models.engine, request)
            return
        found = searched(search, models.engine, request)
        assert_same(found, expected_of(search, toys(), [name], prompt, **ends))
        assert all(engine.opened == 0 for engine in models.engines.values())
        assert found[0].seconds.guide > 0
        unguided = searched(search, toys().engine, Request(tuple(prompt), LIMIT, **ends))
        changed |= [(o.tokens, o.score) for o in found] != [(o.tokens, o.score) for o in unguided]
    assert changed, "a guide that did nothing would pass"


@given(
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=9),
    name=st.sampled_from(TOYS),
    width=st.integers(1, 6),
    wide=st.integers(1, 3),
    limit=st.integers(1, 9),
    ends=st.frozensets(st.integers(0, 10), max_size=2),
)
@settings(max_examples=12, deadline=None)
def test_any_beam_and_lattice_is_that_of_the_guided_model(prompt, name, width, wide, limit, ends):
    lattice = LatticeSearch(nodes=5 * width, width=wide, suffix=1 + wide, top=width, least=0.0)
    for search in (Beam(width=width, returned=width, length_penalty=wide - 1.0), lattice):
        if search.revisits and name == "adaptive":
            continue
        models = toys()
        request = models.request([name], prompt, limit, stop_tokens=ends)
        found = searched(search, models.engine, request)
        assert_same(found, expected_of(search, toys(), [name], prompt, limit, stop_tokens=ends))
        assert all(engine.opened == 0 for engine in models.engines.values())


@pytest.mark.parametrize("kind", SEARCHES)
def test_guides_with_a_defined_order_compose(kind):
    models, names, prompt = toys(), ["contrastive", "proxy", "gedi"], [3, 1, 2]
    found = searched(SEARCHES[kind], models.engine, models.request(names, prompt, LIMIT))
    assert_same(found, expected_of(SEARCHES[kind], toys(), names, prompt))


def recorded(models):
    """The passes of every model, each as the sizes of its trees."""
    passes = {name: [] for name in models.engines}
    for name, engine in models.engines.items():

        def forward(batch, rows="all", view=None, original=engine.forward, own=passes[name]):
            own.append([len(tree) for _, tree in batch])
            return original(batch, rows, view)

        engine.forward = forward
    return passes


@pytest.mark.parametrize(("kind", "most"), [("beam", 3), ("diverse", 4)])
def test_hypotheses_share_a_pass_of_each_guide_and_no_token_is_run_twice(kind, most):
    models = toys(ToyEngine)
    passes = recorded(models)
    found = searched(SEARCHES[kind], models.engine, models.request(["proxy"], [1, 2, 3], LIMIT))
    assert passes["a"] == passes["b"] == passes["c"]
    assert len(passes["a"]) == 1 + found[0].passes == 1 + LIMIT  # the prompt's first
    assert all(sizes == [1] * len(sizes) for sizes in passes["a"][1:])
    assert len(passes["a"][-1]) == most


def test_a_fan_of_candidates_is_one_pass_of_the_guide():
    models = toys()
    passes = recorded(models)
    searched(SEARCHES["contrastive"], models.engine, models.request(["proxy"], [1, 2, 3], LIMIT))
    assert passes["a"] == passes["b"] == passes["c"] == [[2], [1], *[[4]] * LIMIT]


@pytest.mark.parametrize("name", TOYS)
def test_each_sample_is_what_its_seed_gives_alone_and_all_share_passes(name):
    temperature, prompt = Temperature(1.3), [1, 2, 3]

    def request(models, seed):
        guided = models.request([name], prompt, 9, temperature=1.3, seed=seed)
        return replace(guided, controls=(*guided.controls, temperature))

    models = toys(ToyEngine)
    passes = recorded(models)
    task = Task(models.engine, request(models, 5), rebind=lambda seed: request(models, seed))
    found = BestOf(n=3, returned=3, together=2).run(task)
    alone = []
    for seed in range(5, 8):
        other = toys(ToyEngine)
        one = Generation(other.engine, Root(), request(other, seed), Fixed(0)).run()
        alone.append(one.tokens)
    assert sorted(output.tokens for output in found) == sorted(alone)
    assert all(engine.opened == 0 for engine in models.engines.values())
    if name == "proxy":  # of two samples and of one, after the prompt
        assert passes["b"] == passes["a"] == [[2], *[[1, 1]] * 9, *[[1]] * 9]


@pytest.mark.parametrize("name", ["proxy", "cfg", "gedi"])
def test_guided_completions_are_drafted_and_the_programs_are_the_same(name):
    found = []
    for oracle in (False, True):
        models = toys(ToyEngine)
        request = models.request([name], [1, 2, 3], 9)
        drafts = {"drafter": Oracle(models.engine), "budget": Fixed(6)} if oracle else {}
        task = Task(models.engine, request, lambda: TextStream(Letters()), **drafts)
        found.append(SEARCHES["planning"].run(task))
        assert all(engine.opened == 0 for engine in models.engines.values())
    plain, drafted = found
    assert [output.tokens for output in drafted] == [output.tokens for output in plain]
    assert drafted[0].passes < plain[0].passes


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("name", ["cfg", "gedi"])
@pytest.mark.parametrize("after", [0, 3, 9])
def test_an_interrupted_search_leaves_nothing_open(kind, name, after):
    models, count = toys(), 0
    request = models.request([name], [1, 2, 3], LIMIT)
    engine = models.engines["a" if name == "cfg" else "b"]
    original = engine.forward

    def forward(batch, rows="all", view=None):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return original(batch, rows, view)

    engine.forward = forward
    found = searched(SEARCHES[kind], models.engine, request)
    assert {output.finish for output in found} <= {"interrupted", "length"}
    assert all(each.opened == 0 for each in models.engines.values())
    engine.forward = original
    again, fresh = searched(SEARCHES[kind], models.engine, request), toys()
    whole = searched(SEARCHES[kind], fresh.engine, fresh.request([name], [1, 2, 3], LIMIT))
    assert [output.tokens for output in again] == [output.tokens for output in whole]


class Taste:
    """A guide of one's own: it likes the token that a fork has read least often."""

    append_only, log = False, []

    def __init__(self, read=()):
        self.read = list(read)

    def begin(self, sequence):
        self.log.append("begin")

    def lag(self, context):
        return 0

    follow = positions = lambda self, *words: 0

    def run_tree(self, context, tree):
        assert tree.tokens[0] == context[-1]
        self.read = context.tolist()

    def release(self):
        self.log.append("release")

    def fork(self, context, target):
        self.log.append("begin")
        return Taste(self.read)

    def apply(self, logits, history):
        assert self.read == history
        return logits - np.bincount(history, minlength=11).astype(np.float32)

    ranking_logits = apply


def test_a_guide_of_ones_own_is_followed_by_a_fork_for_each_text():
    def distribution(models, text, p, prompt):
        return p * np.exp(-np.bincount(text, minlength=11).astype(np.float64))

    prompt, search, models = [1, 2, 3], SEARCHES["beam"], toys()
    request = Request(tuple(prompt), LIMIT, controls=(Taste(),))
    found = searched(search, models.engine, request)
    assert_same(
        found, searched(search, Recomputed(models, [distribution], 3), Request((1, 2, 3), LIMIT))
    )
    assert Taste.log.count("begin") == Taste.log.count("release") > 3


# ------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def real():
    """A small model, and a larger one of the same tokens."""
    small = load(shared("models", "stories260K"))
    large = open_engine(load(shared("models", "bitstories-1M")), "native", threads=1)
    engine = open_engine(small, "native", threads=1)
    return Models({"a": engine, "b": large, "c": engine}, small.tokenizer)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("kind", SEARCHES)
def test_real_models_are_guided_alike(real, kind, name):
    search = SEARCHES[kind]
    if search.revisits and name == "adaptive":
        return
    prompt, limit = real.tokenizer.encode("Once upon a time, a dog"), 4
    real.known.clear()
    found = searched(search, real.engine, real.request([name], prompt, limit))
    assert_same(found, expected_of(search, real, [name], prompt, limit))


def test_every_guide_and_every_search_is_in_the_matrix():
    assert {spec.partition(":")[0] for spec in SPECS.values()} == set(guides.methods())
    assert {*SEARCHES, "best_of", "superposed"} == set(strategies.methods())

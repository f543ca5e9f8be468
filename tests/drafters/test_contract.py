"""What holds for every drafter, whatever it guesses."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.history.corpus_index import write_corpus
from paceline.errors import MethodError
from paceline.models.tokenizer import open_tokenizer
from paceline.registry import drafters, required
from tests.byte_tokenizer import byte_level
from tests.drafters.steps import asked, check_tree, random_step
from tests.toy import ToyEngine

# Drafters without a model of their own; `tests/test_matrix.py` runs the others on engines.
METHODS = [
    method
    for method in drafters.methods().values()
    if method.__module__.startswith("paceline.") and not issubclass(method, DraftSettings)
]
# Settings of methods that need a file, which `built` makes.
WITH_FILES = {"datastore": ("", "longest=2,k=1,samples=1")}
SPECS = [
    *(example for method in METHODS for example in method.examples),
    *(f"{name}:{settings}".rstrip(":") for name, all_ in WITH_FILES.items() for settings in all_),
]
LEARNING = [spec for spec in SPECS if not spec.startswith(("plain", "hostile", "forced"))]


@pytest.fixture(scope="module", autouse=True)
def no_time_passes():
    """Let `blend` ask its members always: how long they take differs from run to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.drafters.blend.perf_counter", lambda: 1.0)
        yield


def built(spec, vocab):
    """A drafter; `datastore` gets a corpus of its vocabulary."""
    if not spec.startswith("datastore"):
        return drafters.parse(spec).build(Target(vocab))
    with TemporaryDirectory() as folder:
        tokenizer = open_tokenizer(byte_level(Path(folder)))
        tokens = np.random.default_rng(vocab).integers(-1, vocab, 500).astype(np.int32)
        write_corpus(Path(folder) / "corpus", tokens, tokenizer)
        name, _, rest = spec.partition(":")
        method = drafters.parse(f"{name}:path={folder}/corpus,{rest}")
        return method.build(Target(vocab, tokenizer=tokenizer))


def live(drafter, random, vocab, passes):
    """Some requests' worth of passes; yields every tree."""
    for _ in range(2):
        context = random.integers(0, vocab, 5).tolist()
        expected = tuple(random.integers(0, vocab, 20).tolist())
        drafter.begin(asked(context, prediction=expected))
        for _ in range(passes):
            budget = int(random.integers(0, 24))
            tree = drafter.propose(np.array(context, np.int32), budget)
            check_tree(tree, context[-1], budget, vocab, len(drafter.origins))
            yield tree
            step = random_step(random, tree, context, vocab, max(drafter.top_k, 1))
            if drafter.top_k:
                drafter.observe(step)
            context += step.drawn.tolist()


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "parents", "scores", "origin")
    )


def test_every_drafter_has_examples_or_files():
    for method in METHODS:
        assert bool(required(method)) == (method.name in WITH_FILES), method
        assert method.examples or required(method), method
        for example in method.examples:
            assert type(drafters.parse(example)) is method


@pytest.mark.parametrize("spec", ["recycle", "suffix", "lookup", "blend"])
def test_what_is_too_unlikely_is_left_out_and_nothing_else(spec):
    random = np.random.default_rng(0)
    drafter = drafters.parse(spec).build(Target(40))
    context = random.integers(0, 5, 20).tolist()
    drafter.begin(asked(context))
    for _ in range(30):
        whole = drafter.propose(np.array(context, np.int32), 24)
        probs = [1.0]
        for score, parent in zip(whole.scores[1:], whole.parents[1:], strict=True):
            probs.append(probs[parent] * float(score))
        limit = float(random.choice([1e-4, 0.01, 0.2, 1.0]))
        part = drafter.propose(np.array(context, np.int32), 24, limit)
        likely = sum(p >= limit * (1 + 1e-5) for p in probs)
        assert likely <= len(part) <= sum(p >= limit * (1 - 1e-5) for p in probs)
        assert part.tokens.tolist() == whole.tokens[: len(part)].tolist()
        assert part.parents.tolist() == whole.parents[: len(part)].tolist()
        step = random_step(random, whole, context, 40, max(drafter.top_k, 1))
        drafter.observe(step)
        context += step.drawn.tolist()


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 40))
def test_trees_are_valid_and_within_the_budget(spec, seed, vocab):
    drafter = built(spec, vocab)
    for _ in live(drafter, np.random.default_rng(seed), vocab, 8):
        pass


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 40), turns=st.data())
def test_concurrent_drafters_propose_valid_trees(spec, seed, vocab, turns):
    first = built(spec, vocab)
    drafters_ = [first, *(first.fork() or built(spec, vocab) for _ in range(2))]
    lives = [live(d, np.random.default_rng(seed + i), vocab, 8) for i, d in enumerate(drafters_)]
    for _ in range(36):
        next(lives[turns.draw(st.integers(0, 2))], None)


@pytest.mark.parametrize("spec", ["recycle", "suffix", "blend"])
def test_forks_learn_from_each_other(spec):
    random, text = np.random.default_rng(5), list(range(1, 9))
    first = built(spec, 40)
    other = first.fork()
    for drafter in (first, other):
        drafter.begin(asked(text[:1]))
    for end in range(1, len(text)):
        tree = first.propose(np.array(text[:end], np.int32), 0)
        if first.top_k:
            step = random_step(random, tree, text[:end], 40, first.top_k)
            step.top_tokens[0, 0] = step.drawn[0] = text[end]
            first.observe(step)
    guess = other.propose(np.array(text[:4], np.int32), 2)
    assert text[4] in guess.tokens


@pytest.mark.parametrize("spec", SPECS)
def test_output_is_that_of_plain_decoding(spec):
    for temperature in (0.0, 1.0):
        request = Request(prompt=(1, 2, 3), max_new_tokens=40, temperature=temperature, seed=7)

        def run(name, request=request):
            drafter = built(name, 11)
            return Generation(ToyEngine(), drafter, request, Fixed(12)).run()

        assert run(spec).tokens == run("plain").tokens


@pytest.mark.parametrize("spec", SPECS)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_state_goes_round(spec, seed):
    random, vocab = np.random.default_rng(seed), 30
    drafter = built(spec, vocab)
    list(live(drafter, random, vocab, 10))
    twin = built(spec, vocab)
    twin.load({name: array.copy() for name, array in drafter.state().items()})
    for name, array in drafter.state().items():
        assert np.array_equal(array, twin.state()[name]), name
    if spec != "hostile":
        trees = [list(live(d, np.random.default_rng(1), vocab, 10)) for d in (drafter, twin)]
        assert all(same(a, b) for a, b in zip(*trees, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_reset_forgets_everything(spec):
    drafter = built(spec, 30)
    before = list(live(drafter, np.random.default_rng(3), 30, 10))
    drafter.reset()
    after = list(live(drafter, np.random.default_rng(3), 30, 10))
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("spec", LEARNING)
def test_foreign_states_are_refused(spec):
    drafter = built(spec, 30)
    list(live(drafter, np.random.default_rng(5), 30, 5))
    with pytest.raises(MethodError):
        drafter.load({})
    for name, array in drafter.state().items():
        state = drafter.state()
        state[name] = array.astype(np.float64)
        with pytest.raises(MethodError):
            drafter.load(state)
        if name == "read":  # nothing read is a state, too
            continue
        state[name] = array[..., :0]
        with pytest.raises(MethodError):
            drafter.load(state)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.startswith(("recycle", "token_recycling", "blend"))]
)
def test_states_with_impossible_tokens_are_refused(spec):
    drafter = built(spec, 30)
    list(live(drafter, np.random.default_rng(5), 30, 5))
    name = "matrix" if spec.startswith("token_recycling") else "tokens"
    for wrong in (30, -2):
        state = drafter.state()
        state[name][0, 0] = wrong
        with pytest.raises(MethodError, match="impossible"):
            drafter.load(state)


@pytest.mark.parametrize(
    "spec",
    [
        "lookup:longest=0",
        "lookup:k=65",
        "lookup:keep=1.5",
        "lookup:rate=nan",
        "lookup:capacity=0",
        "recycle:tree=oak",
        "token_recycling:tree=oak",
        "recycle:tree=paper,k=8",
        "recycle:orders=0",
        "recycle:skips=-1",
        "recycle:k=0",
        "recycle:keep=-0.1",
        "recycle:rate=inf",
        "recycle:capacity=1000000000000",
        "hostile:seed=-1",
        "lookahead_trie:branch=1",
        "lookahead_trie:k=0",
        "lookahead_trie:here=-1",
        "lookahead_trie:rate=2",
        "lookahead_trie:capacity=1",
        "trigram:k=33",
        "trigram:explore=nan",
        "trigram:depth=0",
        "trigram:keep=2",
        "trigram:capacity=0",
        "predicted_output:branches=0",
        "predicted_output:rate=-1",
        "predicted_output:capacity=0",
        "lookahead:window=0",
        "lookahead:n=1",
        "lookahead:verified=0",
        "lookahead:share=1.1",
        "lookahead:capacity=0",
        "datastore:path=corpus,longest=0",
        "datastore:path=corpus,samples=0",
    ],
)
def test_wrong_settings_are_refused_by_name(spec):
    name = spec.replace("path=corpus,", "").split("=")[0]
    with pytest.raises(MethodError, match=name):
        drafters.parse(spec)


OLD_NAMES = {
    "jacobi": "lookahead",
    "phrases": "predicted_output",
    "partial": "sparse_kv",
    "layers": "layer_skip",
    "trie": "lookahead_trie",
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_are_still_understood(old):
    assert drafters.find(old) is drafters.find(OLD_NAMES[old])
    assert drafters.parse(old).name == OLD_NAMES[old]
    assert old not in drafters.methods()


@pytest.mark.parametrize("tree", ["paper", "static"])
def test_the_trees_of_recycle_are_token_recycling(tree):
    old = drafters.parse(f"recycle:tree={tree}").build(Target(30))
    new = drafters.parse(f"token_recycling:tree={tree}").build(Target(30))
    trees = [list(live(d, np.random.default_rng(1), 30, 10)) for d in (old, new)]
    assert all(same(a, b) for a, b in zip(*trees, strict=True))
    new.load(old.state())


def test_only_hostile_is_hidden():
    ours = [m for m in drafters.methods().values() if m.__module__.startswith("paceline.")]
    assert [m.name for m in ours if m.hidden] == ["hostile"]


def test_hostile_repeats_itself_and_branches():
    context = np.array([3], np.int32)
    one, two = (drafters.parse("hostile:seed=5").build(Target(9)) for _ in range(2))
    trees = [one.propose(context, 12) for _ in range(50)]
    assert all(same(tree, two.propose(context, 12)) for tree in trees)
    assert any((np.bincount(tree.parents[1:]) > 1).any() for tree in trees if len(tree) > 1)
    assert max(len(tree) for tree in trees) > 8


@pytest.mark.parametrize(
    "spec",
    [
        "lookup:capacity=64",
        "recycle:capacity=64",
        "lookahead_trie:capacity=256",
        "trigram:capacity=64",
        "predicted_output",
        "lookahead:capacity=64",
        "datastore",
    ],
)
def test_requests_of_random_text_leave_memory_bounded(spec):
    resource = pytest.importorskip("resource")
    drafter, vocab = built(spec, 1000), 1000
    random = np.random.default_rng(0)

    def requests(count):
        for _ in range(count):
            context = random.integers(0, vocab, 100).tolist()
            drafter.begin(asked(context, prediction=tuple(context)))
            for _ in range(4):
                tree = drafter.propose(np.array(context, np.int32), 16)
                step = random_step(random, tree, context, vocab, max(drafter.top_k, 1))
                if drafter.top_k:
                    drafter.observe(step)
                context += step.drawn.tolist()
        return sum(array.nbytes for array in drafter.state().values())

    first, before = requests(60), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert max(requests(20) for _ in range(6)) <= first * 1.5 + 4096
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 4 << 20

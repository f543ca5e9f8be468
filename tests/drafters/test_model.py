import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.temperature import Temperature
from paceline.core import Cost, Request
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.draft_model.calibration import Calibration
from paceline.drafters.draft_model.frequent_tokens import FrequentTokens
from paceline.drafters.model import DraftModel, Drafts
from paceline.engines import open_engine
from paceline.engines.follower import Follower
from paceline.errors import MethodError, ModelError
from paceline.models import load
from paceline.registry import drafters
from tests.conftest import shared
from tests.drafters.steps import asked, check_tree
from tests.drafters.test_contract import live, same
from tests.toy import ToyEngine

SETTINGS = (
    {},
    {"width": 1, "stop": "depth"},
    {"width": 9, "depth": 2, "threshold": 0.0},
    {"stop": "bandit", "rate": 0.5},
    {"stop": "adaptive"},
    {"head": 5},
)


class Near(ToyEngine):
    """Thinks nearly what the toy engine thinks."""

    def logits_after(self, tokens):
        blur = np.random.default_rng([9, *tokens[-3:]]).normal(0, 0.7, self.config.vocab_size)
        return super().logits_after(tokens) + blur.astype(np.float32)


def drafting(*engines, **settings):
    engines = engines or (Near(),)
    method = DraftModel(path="toy", **settings)
    frequent = FrequentTokens(method.head, 11) if method.head else None
    return Drafts(method, 11, [Follower(engine) for engine in engines], frequent=frequent)


def run(drafter, request, budget=8, engine=None):
    return Generation(engine or ToyEngine(), drafter, request, Fixed(budget)).run()


def request_at(temperature, seed=0, length=40, prompt=(1, 2, 3)):
    return Request(
        prompt, length, temperature, seed, (Temperature(temperature),) if temperature else ()
    )


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_output_is_that_of_plain_decoding(chosen, temperature):
    drafter = drafting(**chosen)
    plain = drafters.parse("plain").build(Target(11))
    for seed in range(3):
        request = request_at(temperature, seed, prompt=(1, 2, 3 + seed))
        output = run(drafter, request)
        assert output.tokens == run(plain, request).tokens
        assert output.tokens_per_pass > 1.3


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_history_gives_valid_trees_and_state_goes_round(chosen, seed):
    random = np.random.default_rng(seed)
    drafter, twin = drafting(**chosen), drafting(**chosen)
    list(live(drafter, random, 11, 8))
    twin.load(drafter.state())
    trees = [list(live(d, np.random.default_rng(1), 11, 8)) for d in (drafter, twin)]
    assert all(same(a, b) for a, b in zip(*trees, strict=True))


def test_forty_requests_with_state_saved_and_loaded_change_no_token():
    plain = drafters.parse("plain").build(Target(11))
    drafter = drafting(stop="bandit")
    for number in range(40):
        prompt = tuple(int(t) for t in np.random.default_rng(number).integers(0, 11, 5))
        request = request_at((0.0, 0.7, 1.0)[number % 3], number, 12, prompt[: 1 + number % 5])
        assert run(drafter, request).tokens == run(plain, request).tokens
        if number % 8 == 7:
            state = drafter.state()
            drafter = drafting(stop="bandit")
            drafter.load(state)


def test_reset_forgets_and_gives_the_memory_back():
    engine = Near()
    drafter = drafting(engine)
    before = list(live(drafter, np.random.default_rng(3), 11, 8))
    drafter.reset()
    assert engine.opened == 0
    after = list(live(drafter, np.random.default_rng(3), 11, 8))
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


def test_the_noise_of_the_walk_makes_a_right_draft_certain():
    """A draft that is the target finds every token, at any temperature."""
    for temperature in (0.0, 1.0):
        drafter = drafting(ToyEngine(), width=8, depth=4, stop="depth")
        output = run(drafter, request_at(temperature, seed=5), budget=24)
        assert output.passes < 10
        assert output.accepted["model"] == 40 - output.passes


def test_an_unsure_draft_asks_the_next_one():
    flat = ToyEngine()
    flat.logits_after = lambda tokens: np.zeros(11, np.float32)
    alone = run(drafting(flat), request_at(0.0))
    helped = run(drafting(flat, ToyEngine()), request_at(0.0))
    assert helped.passes < alone.passes / 1.5
    assert helped.tokens == alone.tokens
    sure = run(drafting(flat, ToyEngine(), trust=0.0), request_at(0.0))
    assert sure.passes == alone.passes


def test_a_shorter_context_ends_the_drafting_not_the_text():
    drafter = drafting(Near(context=12))
    output = run(drafter, request_at(0.0))
    assert output.tokens == run(drafting(Near()), request_at(0.0)).tokens
    assert drafter.propose(np.ones(13, np.int32), 8).tokens.tolist() == [1]
    deepest = drafter.propose(np.ones(11, np.int32), 8)
    assert deepest.depths().max() <= 2
    drafter.begin(asked([1] * 20))


def test_a_padded_or_smaller_vocabulary_is_no_harm():
    larger = drafting(ToyEngine(vocab_size=16))
    smaller = drafting(ToyEngine(vocab_size=7))
    for drafter in (larger, smaller):
        for temperature in (0.0, 1.0):
            request = request_at(temperature)
            plain = drafters.parse("plain").build(Target(11))
            assert run(drafter, request).tokens == run(plain, request).tokens
    check_tree(larger.propose(np.array([1, 2], np.int32), 9), 2, 9, 11)
    assert len(smaller.propose(np.array([9, 2], np.int32), 9)) == 1


def test_logits_that_are_no_numbers_are_no_harm():
    broken = ToyEngine()
    broken.logits_after = lambda tokens: np.full(11, np.nan, np.float32)
    for temperature in (0.0, 1.0):
        plain = drafters.parse("plain").build(Target(11))
        assert (
            run(drafting(broken), request_at(temperature)).tokens
            == run(plain, request_at(temperature)).tokens
        )


def test_foreign_states_are_refused():
    drafter = drafting()
    for state in (
        {},
        drafting(stop="bandit").state(),
        drafter.state() | {"sharpness": np.array([0.0, 1.0])},
        drafter.state() | {"sharpness": np.ones(3)},
        drafter.state() | {"ranks": np.full((2, 8), np.nan)},
    ):
        with pytest.raises(MethodError, match="reset it"):
            drafter.load(state)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("model", "model needs path"),
        ("model:path=", "has no value|expected folders"),
        ("model:path=a|", "expected folders"),
        ("model:path=a,width=0", "model:width is 0"),
        ("model:path=a,depth=65", "model:depth is 65"),
        ("model:path=a,stop=never", "model:stop is 'never'"),
        ("model:path=a,stop=depth,threshold=0.5", "does not use threshold"),
        ("model:path=a,trust=nan", "model:trust is nan"),
        ("model:path=a,head=-1", "model:head is -1"),
    ],
)
def test_wrong_settings_are_refused_by_name(spec, said):
    with pytest.raises(MethodError, match=said):
        drafters.parse(spec)


def test_only_frequent_tokens_are_guessed():
    for temperature in (0.0, 1.0):
        drafter = drafting(head=4)
        drafter.begin(request_at(temperature, prompt=(9, 10, 9)))
        context = np.array([9, 10, 9], np.int32)
        guessed = set(drafter.propose(context, 9).tokens[1:].tolist())
        assert guessed
        assert guessed <= {0, 1, 9, 10}


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 10), min_size=3), st.sampled_from([0.0, 0.7]), st.integers(0, 2**32 - 1)
)
def test_tokens_without_logits_are_impossible_ones(some, temperature, seed):
    ids = np.array(sorted(some), np.int32)
    logits = np.random.default_rng(seed).normal(0, 3, (4, 11)).astype(np.float32)
    masked = np.full_like(logits, -np.inf)
    masked[:, ids] = logits[:, ids]
    positions = np.array([3, 4, 4, 9], np.int32)
    calibration = Calibration(0.02, 11)
    calibration.begin(request_at(temperature, seed))
    tokens, likely = calibration.judge(masked, positions, 3)
    fewer, as_likely = calibration.judge(logits[:, ids], positions, 3, ids)
    assert fewer.tolist() == tokens.tolist()
    np.testing.assert_allclose(as_likely, likely, atol=1e-6)
    if temperature:
        rows, _ = calibration.draw(masked, [1] * 4, np.random.default_rng(0))
        same_rows, drawn = calibration.draw(logits[:, ids], [3] * 4, np.random.default_rng(0), ids)
        np.testing.assert_allclose(same_rows, rows, atol=1e-6)
        assert set(np.concatenate(drawn).tolist()) <= some


def test_a_reduced_head_is_refused_where_it_cannot_be():
    chat, story = shared("models", "tinystories-instruct-3m-chat"), shared("models", "stories260K")
    tokenizer = load(chat).tokenizer
    with pytest.raises(
        MethodError, match="model:head and a draft with another tokenizer do not go together"
    ):
        drafters.parse(f"model:path={story},head=100").build(Target(14019, None, tokenizer))


def test_a_missing_draft_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        drafters.parse(f"model:path={tmp_path / 'nowhere'}").build(Target(11))


def test_a_draft_of_another_size_needs_a_tokenizer():
    folder = shared("models", "stories260K")
    with pytest.raises(MethodError, match="stories260K has 512 tokens, the target 11"):
        drafters.parse(f"model:path={folder}").build(Target(11))


PAIRS = [
    ("bitstories-3M", "stories260K", ""),
    ("bitstories-3M", "stories260K|bitstories-1M", ",stop=bandit"),
    ("bitstories-3M", "TinyStories-656K", ""),
    ("tinystories-instruct-3m-chat", "stories260K", ",stop=depth,depth=3"),
    ("bitstories-3M", "stories260K|bitstories-1M", ",head=100"),
    ("bitstories-3M", "stories260K", ",schedule=pearl,head=200"),
]


@pytest.mark.parametrize(
    ("target", "drafts", "settings", "engine"),
    [*((*pair, "native") for pair in PAIRS), (*PAIRS[0], "reference")],
)
def test_real_pairs_decode_what_plain_decoding_does(target, drafts, settings, engine):
    folders = "|".join(str(shared("models", name)) for name in drafts.split("|"))
    if engine == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    lm = LM(shared("models", target), engine=engine, drafter="plain")
    drafter = drafters.parse(f"model:path={folders}{settings}").build(lm.draft_target)
    tokens = passes = 0
    for seed, temperature in enumerate((0.0, 0.7, 1.0)):
        for prompt in ("Once upon a time, there was a little girl", "One day, a dog"):
            request = lm.request(
                prompt, max_new_tokens=24, temperature=temperature, seed=seed, ignore_eos=True
            )
            plain = Generation(lm.engine, lm.drafter, request, Fixed(0), margins=True).run()
            output = Generation(lm.engine, drafter, request, Fixed(8)).run()
            differs = np.flatnonzero(np.array(output.tokens) != np.array(plain.tokens))
            if len(differs):
                assert not lm.engine.invariant
                assert plain.margins[differs[0]] <= lm.engine.tolerance / (temperature or 1.0)
            tokens, passes = tokens + len(output.tokens), passes + output.passes
    assert tokens > 1.1 * passes


def test_a_draft_gets_an_engine_like_the_targets():
    folder = shared("models", "stories260K")
    engine = open_engine(load(folder), "native", threads=1)
    drafter = drafters.parse(f"model:path={folder},format=int8").build(
        Target(512, engine, load(folder).tokenizer)
    )
    (follower,) = drafter._followers
    own = follower.engine
    assert (own.name, own.threads, own.format) == ("native", 1, "int8")


class Counting(Near):
    """Counts the tokens that it runs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ran = 0

    def forward(self, batch, rows="all", view=None):
        self.ran += sum(len(tree) for _, tree in batch)
        return super().forward(batch, rows, view)


class Awake(Fixed):
    """Drafts in the passes of `when`; what the draft has run after each is kept."""

    def __init__(self, when, engine, nodes=4):
        super().__init__(nodes)
        object.__setattr__(self, "when", when)
        object.__setattr__(self, "engine", engine)
        object.__setattr__(self, "ran", [])
        object.__setattr__(self, "charged", [])

    def nodes_wanted(self, requests=1):
        return self.nodes if len(self.ran) in self.when else 0

    def record(self, trees, paths, draft, forward, other_tokens=0):
        self.ran.append(self.engine.ran)

    def charge(self, seconds):
        self.charged.append(seconds)


def test_a_draft_that_rests_runs_nothing():
    engine = Counting(context=400)
    request = Request(tuple(i % 11 for i in range(200)), 100)
    budget = Awake((), engine)
    output = Generation(ToyEngine(context=400), drafting(engine), request, budget).run()
    assert output.passes == 100
    assert engine.ran == 0
    assert not budget.charged


@pytest.mark.parametrize(("rest", "most"), [(20, 20), (150, 128)])
def test_a_draft_that_wakes_reads_what_it_lacks_or_the_end(rest, most):
    engine = Counting(context=500)
    request = Request(tuple(i % 11 for i in range(200)), 200)
    budget = Awake((0, rest + 1), engine)
    output = Generation(ToyEngine(context=500), drafting(engine), request, budget).run()
    assert output.tokens == run(drafting(), request, 0, ToyEngine(context=500)).tokens
    assert budget.ran[0] >= 199, "the prompt was read, as it drafted at once"
    assert budget.ran[rest] == budget.ran[0]
    assert len(budget.charged) == 1
    read = budget.ran[rest + 1] - budget.ran[rest]
    assert most - 16 <= read <= most + 40, "and the trees of one proposal"


def test_a_draft_that_begins_at_the_end_drafts_like_one_that_read_all():
    text = np.array([i % 7 for i in range(300)], np.int32)
    whole, late = drafting(Near(context=500)), drafting(Near(context=500))
    for drafter in (whole, late):
        drafter.begin(Request(tuple(text.tolist()), 50))
    whole.follow(text)
    assert (
        late.follow_recent(text, 63) == 62
    )  # the toy model sees so far, and the root is run later
    a, b = whole.propose(text, 6), late.propose(text, 6)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert late.follow_recent(text, 63) == 0
    longer = np.append(text, a.tokens[1]).astype(np.int32)
    check_tree(late.propose(longer, 6), int(longer[-1]), 6, 11)
    late.begin(Request((1, 2, 3), 5))
    assert len(late.propose(np.array([1, 2, 3], np.int32), 6)) > 1


class Doubtful(Governor):
    """Always drafts, and is in doubt or not as it was told."""

    doubtful = False

    def nodes_wanted(self, requests=1):
        return 4

    def prune(self, trees, seconds, other_tokens=0):
        return list(trees)

    def record(self, trees, paths, draft, forward, other_tokens=0):
        pass


@pytest.mark.parametrize(("doubtful", "least", "most"), [(False, 399, 600), (True, 120, 330)])
def test_a_trial_after_a_rest_reads_the_end_of_the_prompt_only(doubtful, least, most):
    engine, prompt = Counting(context=700), tuple(i % 11 for i in range(400))
    governor = Doubtful(Cost((1, 2), (1.0, 1.0)))
    governor.doubtful = doubtful
    Generation(ToyEngine(context=700), drafting(engine), Request(prompt, 3), governor).run()
    assert least <= engine.ran <= most
    assert (governor.report()["saved_seconds"] < 0) == doubtful, "only a trial is charged"

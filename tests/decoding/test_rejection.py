"""The output's law, enumerated: the rejection walk gives that of plain decoding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.temperature import Temperature
from paceline.control.top_k import TopK
from paceline.core import Cost, Request
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.decoding.rejection import settle
from paceline.drafters.base import Target
from paceline.drafters.model import DraftModel, Drafts
from paceline.engines.follower import Follower
from paceline.errors import MethodError
from paceline.registry import drafters
from tests.toy import ToyEngine

VOCAB, LENGTH, RUNS = 4, 3, 1200


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def request(seed, *controls, temperature=2.0, walk="rejection", length=LENGTH):
    controls = (Temperature(temperature), *controls)
    return Request((1, 2), length, temperature, seed, controls, walk=walk)


class Toy(ToyEngine):
    """Remembers what it thought."""

    def __init__(self, **options):
        super().__init__(VOCAB, **options)
        self.known = {}

    def logits_after(self, tokens):
        key = tuple(tokens)
        if key not in self.known:
            self.known[key] = super().logits_after(tokens)
        return self.known[key]


def distribution(engine, asked):
    """The exact probability of each output."""
    probs = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        history, prob = list(asked.prompt), 1.0
        for token in text:
            logits = engine.logits_after(history)
            for control in asked.controls:
                logits = control.apply(logits, history)
            prob *= softmax(logits)[token]
            history.append(token)
        probs[text] = prob
    return probs


def drafting(**settings):
    """Another model drafts: other seeds, so that it is wrong most of the time."""
    draft = Toy(order=3)
    return Drafts(DraftModel(path="toy", **settings), VOCAB, [Follower(draft)])


@pytest.mark.parametrize(
    ("settings", "budget", "controls"),
    [
        ({"width": 1, "stop": "depth"}, 3, ()),
        ({"width": 3, "stop": "depth"}, 6, ()),
        ({"width": 4, "stop": "bandit"}, 9, (TopK(3),)),
        ({"width": 2, "stop": "adaptive"}, 6, ()),
    ],
    ids=["chain", "tree", "bandit and top-k", "adaptive"],
)
def test_the_law_is_that_of_plain_decoding(settings, budget, controls):
    engine, drafter = Toy(), drafting(**settings)
    counts = dict.fromkeys(itertools.product(range(VOCAB), repeat=LENGTH), 0)
    accepted = 0
    for seed in range(RUNS):
        output = Generation(engine, drafter, request(seed, *controls), Fixed(budget)).run()
        counts[tuple(output.tokens)] += 1
        accepted += sum(output.accepted.values())
    exact = distribution(engine, request(0, *controls))
    probs = np.array(list(exact.values()))
    distance = np.abs(np.array(list(counts.values())) / RUNS - probs).sum() / 2
    draws = np.random.default_rng(0).multinomial(RUNS, probs, 2000) / RUNS
    sampling_error = np.quantile(np.abs(draws - probs).sum(1) / 2, 0.999)
    assert distance < sampling_error < 0.15
    assert accepted > RUNS / 4
    assert not any(counts[text] for text, prob in exact.items() if prob == 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_a_token_follows_p_whatever_q_is(seed, guesses):
    """All draws without replacement, and all verdicts on them, weighed by their chances."""
    random = np.random.default_rng(seed)
    p, q = (softmax(random.normal(0, 2, VOCAB)) for _ in range(2))
    found = np.zeros(VOCAB)
    for order in itertools.permutations(range(VOCAB), guesses):
        prob, rest = 1.0, q.copy()
        for token in order:
            prob *= rest[token] / rest.sum()
            rest[token] = 0
        found += prob * verdicts(p, q, list(order))
    assert found == pytest.approx(p, abs=1e-6)


class Scripted:
    """Random numbers that were written down."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def random(self):
        return next(self.numbers)


def verdicts(p, q, guesses):
    """The law of the token that `settle` gives: its random numbers are bisected."""
    distribution, reached, q = np.zeros(VOCAB), 1.0, q.astype(np.float32)
    refusals = []
    for place, guess in enumerate(guesses):
        prob = share(
            lambda u, k=place: settle(p, q, guesses, Scripted(*refusals, u, 1, 1, 1, 0))[1] == k
        )
        distribution[guess] += reached * prob
        reached *= 1.0 - prob
        if reached < 1e-9:
            return distribution
        refusals.append(1.0)
    bounds = [
        share(lambda u, t=token: settle(p, q, guesses, Scripted(*refusals, u))[0] <= t)
        for token in range(VOCAB)
    ]
    return distribution + reached * np.diff([0.0, *bounds])


def share(holds):
    """Up to which number in 0..1 something holds."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def test_greedy_decoding_has_one_walk():
    engine = ToyEngine()
    asked = Request((1, 2), 12, walk="rejection")
    plain = drafters.parse("plain").build(Target(11))
    draft = Drafts(DraftModel(path="toy"), 11, [Follower(ToyEngine(order=3))])
    outputs = [Generation(engine, d, asked, Fixed(6)).run().tokens for d in (plain, draft)]
    assert outputs[0] == outputs[1]


def test_what_cannot_be_done_is_refused():
    engine, recycle = ToyEngine(VOCAB), drafters.parse("recycle").build(Target(VOCAB))
    with pytest.raises(MethodError, match="the drafter recycle do not go together"):
        Generation(engine, recycle, request(0), Fixed(4))
    governor = Governor(Cost((1, 2), (1.0, 1.1)))
    with pytest.raises(MethodError, match="the budget auto do not go together"):
        Generation(engine, drafting(), request(0), governor)
    with pytest.raises(MethodError, match="walk is 'moon'"):
        Generation(engine, drafting(), request(0, walk="moon"), Fixed(4))


def test_a_tree_that_is_cut_keeps_its_rows():
    """The last passes of a request are cut to the tokens that are still wanted."""
    engine, drafter = ToyEngine(VOCAB), drafting(width=4, stop="depth")
    for length in range(1, 8):
        output = Generation(engine, drafter, request(3, length=length), Fixed(12)).run()
        assert len(output.tokens) == length


def test_without_guesses_p_decides():
    p, q = np.array([0.0, 1.0, 0.0]), np.zeros(3, np.float32)
    assert settle(p, q, [], np.random.default_rng(0)) == (1, None)


def test_a_draft_that_is_no_number_is_refused_and_leaves_p_as_it_is():
    q, p = np.full(3, np.nan, np.float32), np.array([0.2, 0.5, 0.3])
    found = [settle(p, q, [0, 1], np.random.default_rng(seed)) for seed in range(3000)]
    assert {place for _, place in found} == {None}
    shares = np.bincount([token for token, _ in found], minlength=3) / len(found)
    assert shares == pytest.approx(p, abs=0.04)

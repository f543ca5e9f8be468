import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.bad_words import BadWords
from paceline.control.base import bind, chain
from paceline.control.dry import Dry
from paceline.control.dynamic_temperature import DynamicTemperature
from paceline.control.epsilon import Epsilon
from paceline.control.eta import Eta
from paceline.control.first_token import FirstToken
from paceline.control.frequency_penalty import FrequencyPenalty
from paceline.control.last_token import LastToken
from paceline.control.length_decay import LengthDecay
from paceline.control.logit_bias import LogitBias
from paceline.control.logits import softmax
from paceline.control.min_length import MinLength
from paceline.control.min_p import MinP
from paceline.control.mirostat import Mirostat
from paceline.control.no_repeat_ngram import NoRepeatNgram
from paceline.control.presence_penalty import PresencePenalty
from paceline.control.repetition_penalty import RepetitionPenalty
from paceline.control.temperature import Temperature
from paceline.control.top_a import TopA
from paceline.control.top_k import TopK
from paceline.control.top_n_sigma import TopNSigma
from paceline.control.top_p import TopP
from paceline.control.typical import Typical
from paceline.control.xtc import Xtc
from paceline.core import Request
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.models.vocabulary import Vocabulary
from paceline.registry import controls

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("transformers.generation.logits_process")

SIZE = 40
PROMPT = 3
REQUEST = Request(tuple(range(PROMPT)), 4, stop_tokens=frozenset({2, 7}))

PAIRS = [
    (Temperature(0.7), lambda: theirs.TemperatureLogitsWarper(0.7)),
    (TopK(5), lambda: theirs.TopKLogitsWarper(5)),
    (TopP(0.8), lambda: theirs.TopPLogitsWarper(0.8)),
    (MinP(0.1), lambda: theirs.MinPLogitsWarper(0.1)),
    (RepetitionPenalty(1.3), lambda: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
    (Typical(0.7), lambda: theirs.TypicalLogitsWarper(0.7)),
    (Epsilon(0.02), lambda: theirs.EpsilonLogitsWarper(0.02)),
    (Eta(0.05), lambda: theirs.EtaLogitsWarper(0.05)),
    (NoRepeatNgram(2), lambda: theirs.NoRepeatNGramLogitsProcessor(2)),
    (NoRepeatNgram(1), lambda: theirs.NoRepeatNGramLogitsProcessor(1)),
    (
        LogitBias("3=2.5;9=-4;39=0.5"),
        lambda: theirs.SequenceBiasLogitsProcessor({(3,): 2.5, (9,): -4.0, (39,): 0.5}),
    ),
    (
        BadWords("4;5 6;0 1 2 3"),
        lambda: theirs.NoBadWordsLogitsProcessor([[4], [5, 6], [0, 1, 2, 3]]),
    ),
    (FirstToken(9), lambda: theirs.ForcedBOSTokenLogitsProcessor(9)),
    (LastToken(9), lambda: theirs.ForcedEOSTokenLogitsProcessor(PROMPT + 4, 9)),
    (MinLength(2), lambda: theirs.MinNewTokensLengthLogitsProcessor(PROMPT, 2, [2, 7])),
    (
        LengthDecay(1, 1.4),
        lambda: theirs.ExponentialDecayLengthPenalty((1, 1.4), [2, 7], PROMPT),
    ),
]
# What is not in transformers, with a reading of its definition over one row.
OURS = {
    "top_a": (TopA(0.3), lambda z, p: p >= 0.3 * p.max() ** 2),
    "top_n_sigma": (TopNSigma(0.8), lambda z, p: z >= z.max() - 0.8 * z.std()),
    "mirostat": (Mirostat(1.5, 0.2), lambda z, p: (-np.log2(p) <= 3.0) | (z == z.max())),
}


def bound(method, request=REQUEST, size=SIZE):
    head = np.random.default_rng(0).normal(size=(size, 6)).astype(np.float32)
    return bind([method], request, Vocabulary(size, head=lambda: head)).controls[0]


def row(seed, size=SIZE):
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("ours", "reference"), PAIRS, ids=lambda p: getattr(type(p), "name", ""))
@given(seed=seeds, length=st.integers(PROMPT, PROMPT + 4))
@settings(max_examples=60)
def test_equal_to_transformers(ours, reference, seed, length):
    logits = row(seed)
    history = np.random.default_rng(seed).integers(0, 8, length).tolist()
    if isinstance(ours, FirstToken) and length == PROMPT:
        history, request = [5], Request((5,), 4)  # theirs looks for a text of one token
    else:
        request = REQUEST
    before = logits.copy()
    expected = reference()(torch.tensor([history]), torch.tensor(logits)[None])[0]
    found = torch.tensor(bound(ours, request).apply(logits, history))
    assert torch.equal(torch.isinf(found), torch.isinf(expected))
    assert torch.allclose(found.softmax(0), expected.softmax(0), atol=1e-6)
    assert np.array_equal(logits, before), "a control must not write to its input"


@pytest.mark.parametrize("name", OURS)
@given(seeds)
@settings(max_examples=60)
def test_what_is_kept_is_what_the_definition_keeps(name, seed):
    method, definition = OURS[name]
    logits = row(seed)
    found = bound(method).apply(logits, [0, 1, 2])
    kept = definition(logits.astype(np.float64), softmax(logits))
    assert np.array_equal(np.isfinite(found), kept)
    assert np.array_equal(found[kept], logits[kept])


TEXTS = {
    "logit_bias": "logit_bias:biases=3=2;5=-100",
    "bad_words": "bad_words:words=3;4 5",
    "first_token": "first_token:token=3",
    "last_token": "last_token:token=3",
    "min_length": "min_length:tokens=3",
    "length_decay": "length_decay:start=1",
    "dry": "dry:breakers=3",
}


SPEAK_TEXT = ("grammar", "letters", "sounds", "keywords", "monitor")  # have tests of their own


@pytest.mark.parametrize("name", [n for n in controls.methods() if n not in SPEAK_TEXT])
@given(seed=seeds, forbidden=st.integers(0, SIZE - 1), length=st.integers(PROMPT, PROMPT + 3))
@settings(max_examples=25)
def test_every_control_is_pure_and_leaves_what_is_forbidden(name, seed, forbidden, length):
    """Over rows with forbidden tokens, asked twice: no NaN, no token comes back, the same twice."""
    method = controls.parse(TEXTS.get(name, name))
    generator = np.random.default_rng(seed)
    first, second = bound(method), bound(method)
    history = generator.integers(0, 8, PROMPT).tolist()
    while True:
        logits = generator.normal(0, 3, SIZE).astype(np.float32)
        logits[:forbidden] = -np.inf
        copy = logits.copy()
        found = first.apply(logits, history)
        assert np.array_equal(found, first.apply(logits, list(history)))
        assert np.array_equal(found, second.apply(copy, history))
        assert np.array_equal(logits, copy)
        assert found.dtype == np.float32
        assert found.shape == (SIZE,)
        assert not np.isnan(found).any()
        if name not in ("first_token", "last_token"):
            assert not np.isfinite(found[:forbidden]).any()
        if len(history) >= length:
            return
        history.append(int(generator.integers(forbidden, SIZE)))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Temperature, 0),
        (TopK, 0),
        (TopP, -0.1),
        (TopP, 1.1),
        (MinP, -1),
        (Typical, 0),
        (TopA, 2),
        (Epsilon, 1),
        (Eta, -0.1),
        (TopNSigma, -1),
        (Xtc, 2),
        (Mirostat, 0),
        (DynamicTemperature, -1),
        (FrequencyPenalty, 3),
        (PresencePenalty, -3),
        (Dry, -1),
        (NoRepeatNgram, 0),
        (FirstToken, -1),
        (LastToken, -1),
        (MinLength, -1),
        (LengthDecay, -1),
    ],
)
def test_absurd_settings_are_refused(kind, value):
    with pytest.raises(RequestError, match="expected"):
        kind(value)
    with pytest.raises(RequestError, match="expected"):
        kind(float("nan"))


def test_neutral_settings_change_nothing():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    neutral = [
        Temperature(1.0),
        TopK(9),
        TopP(1.0),
        MinP(0.0),
        RepetitionPenalty(1.0),
        Typical(1.0),
        TopA(0.0),
        Epsilon(0.0),
        Eta(0.0),
        TopNSigma(100.0),
        Xtc(probability=0.0),
        Xtc(threshold=1.0),
        DynamicTemperature(0.0),
        FrequencyPenalty(0.0),
        PresencePenalty(0.0),
        Dry(0.0, breakers=""),
        NoRepeatNgram(9),
        LogitBias(""),
        BadWords(""),
        MinLength(0),
        LengthDecay(0, 1.0),
    ]
    request = Request((1, 2), 4, stop_tokens=frozenset({2}))
    for control in neutral:
        found = bound(control, request, 3).apply(logits, [1, 2, 1])
        assert np.array_equal(found, logits), control


def test_the_chain_has_one_order():
    methods = [controls.parse(text) for text in ("min_p", "top_p:p=0.9", "temperature:value=2")]
    names = [type(m).__name__ for m in chain([*methods, RepetitionPenalty(), TopK()])]
    assert names == ["RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]
    orders = [method.order for method in controls.methods().values()]
    assert len(set(orders)) == len(orders), "two controls at one place"


def test_one_kind_is_given_once():
    with pytest.raises(MethodError, match="top_k is given twice"):
        chain([TopK(3), TopK(4)])


@given(seeds, st.floats(0.05, 3.0))
@settings(max_examples=40)
def test_dynamic_temperature_is_edt(seed, temperature):
    logits = row(seed)
    p = torch.tensor(logits).double().softmax(0)
    spread = float(torch.distributions.Categorical(p).entropy())
    expected = (torch.tensor(logits).double() / (temperature * 0.8 ** (0.5 / spread))).softmax(0)
    found = DynamicTemperature(0.5).apply(logits, [])
    found = Temperature(temperature).apply(found, [])
    assert np.allclose(softmax(found), expected.numpy(), atol=1e-5)


@given(seeds)
@settings(max_examples=40)
def test_counting_penalties(seed):
    logits, history = row(seed), np.random.default_rng(seed).integers(0, 8, 9).tolist()
    counts = np.bincount(history[PROMPT:], minlength=SIZE)
    frequency = bound(FrequencyPenalty(0.7)).apply(logits, history)
    presence = bound(PresencePenalty(0.7)).apply(logits, history)
    assert np.allclose(frequency, logits - 0.7 * counts, atol=1e-5)
    assert np.allclose(presence, logits - 0.7 * (counts > 0), atol=1e-5)


def dry_by_definition(logits, history, method, breaks):
    """For every earlier place: how long is the run that ends there and at the end?"""
    edited = logits.astype(np.float64)
    longest = {}
    for end in range(len(history) - 1):
        length = 0
        while (
            length <= end
            and history[end - length] == history[-1 - length]
            and history[end - length] not in breaks
        ):
            length += 1
        longest[history[end + 1]] = max(longest.get(history[end + 1], 0), length)
    for token, length in longest.items():
        if length >= method.allowed:
            edited[token] -= method.multiplier * method.base ** (length - method.allowed)
    return edited


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 3), st.booleans())
def test_dry_is_its_definition(history, allowed, broken):
    method = Dry(0.9, 1.3, allowed, breakers="3" if broken else "")
    found = bound(method).apply(row(1), history)
    expected = dry_by_definition(row(1), history, method, {3} if broken else set())
    assert np.allclose(found, expected, atol=1e-3)


def test_dry_reaches_as_far_as_it_is_told():
    history = [1, 2, 3, 9, 8, 1, 2]
    assert bound(Dry(breakers="")).apply(row(1), history)[3] < row(1)[3]
    near = bound(Dry(breakers="", reach=4)).apply(row(1), history)
    assert np.array_equal(near, row(1))


def test_xtc_drops_all_top_choices_but_the_least():
    logits = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05], np.float32))
    found = bound(Xtc(0.1, 1.0)).apply(logits, [0])
    assert np.flatnonzero(np.isfinite(found)).tolist() == [1, 3, 4]
    assert np.array_equal(bound(Xtc(0.45, 1.0)).apply(logits, [0]), logits)


def test_xtc_acts_as_often_as_it_should_and_depends_on_seed_and_position_only():
    logits = np.log(np.array([0.5, 0.5], np.float32))

    def acts(seed):
        control = bound(Xtc(0.1, 0.3), Request((0,), 4, seed=seed))
        return [bool(np.isinf(control.apply(logits, [1] * n)).any()) for n in range(2000)]

    assert 0.26 < np.mean(acts(0)) < 0.34  # 4 standard deviations
    assert acts(0) == acts(0) != acts(1)


def test_mirostat_follows_its_rule():
    tau, eta = 1.0, 0.5
    control = bound(Mirostat(tau, eta))
    history, mu = [0, 1, 2], 2 * tau
    for step in range(20):
        logits = row(step)
        bits = -np.log2(softmax(logits))
        found = control.apply(logits, history)
        assert np.array_equal(np.isfinite(found), (bits <= mu) | (logits == logits.max()))
        token = int(np.flatnonzero(np.isfinite(found))[-1])
        mu -= eta * (bits[token] - tau)
        history.append(token)
    assert np.array_equal(
        control.apply(row(0), [0, 1, 2]), bound(Mirostat(tau)).apply(row(0), [0] * 3)
    )


def test_mirostat_out_of_order_is_refused():
    control = bound(Mirostat())
    control.apply(row(0), [0, 1, 2])
    with pytest.raises(RequestError, match="out of order"):
        control.apply(row(0), [0, 1, 2, 3, 4])


def test_contradictions_and_unknown_tokens_are_refused():
    for method in (
        LogitBias("40=1"),
        BadWords("40"),
        FirstToken(40),
        LastToken(99),
        Dry(breakers="77"),
    ):
        with pytest.raises(RequestError, match="outside the vocabulary of 40"):
            bound(method)
    with pytest.raises(RequestError, match="at most the 4"):
        bound(MinLength(5))
    with pytest.raises(MethodError, match="by their ids"):
        bound(BadWords('"damn"'))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "expected ID=NUMBER"),
        ("3=", "expected ID=NUMBER"),
        ("-3=1", "expected ID=NUMBER"),
        ("3=nan", "-100 to 100"),
        ("3=101", "-100 to 100"),
        ("3=1;3=2", "twice"),
    ],
)
def test_bad_biases(text, said):
    with pytest.raises(PacelineError, match=said):
        LogitBias(text)

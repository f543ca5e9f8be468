"""Each guide against its formula, computed anew from probabilities and whole texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.capabilities import RunsModel
from paceline.control.guides.dola import candidates, divergence
from paceline.core import TokenTree
from paceline.engines.view import View
from paceline.errors import PacelineError
from tests.conftest import shared
from tests.control.guides.beside_toy import SPECS, ToyBeside, toy_request

TEXT = st.lists(st.integers(0, 10), min_size=3, max_size=14)
PROMPT = (1, 2, 3)


def softmax(x):
    powers = np.exp(np.asarray(x, np.float64) - np.max(x))
    return powers / powers.sum()


def near(distribution):
    return pytest.approx(distribution / distribution.sum(), rel=1e-4, abs=1e-6)


class Setting:
    """What models say after whole texts."""

    def __init__(self, temperature=0.0):
        self.beside, self.temperature = ToyBeside(), temperature

    def guided(self, spec, text):
        """A guide's probabilities at temperature 1, asked once, without `run_tree`."""
        request = toy_request(self.beside, spec, PROMPT, self.temperature)
        return softmax(request.controls[0].apply(self.after("a", text), list(text)))

    def after(self, model, text):
        return self.beside.engines[model].logits_after([int(token) for token in text])


def texts(test):
    return settings(max_examples=40, deadline=None)(
        given(TEXT.map(lambda end: (*PROMPT, *end)))(test)
    )


@texts
def test_proxy_multiplies_by_the_ratio_of_tuned_and_base(text):
    of = Setting()
    p, tuned, base = (softmax(of.after(m, text)) for m in "abc")
    expected = p * (tuned / base) ** 0.7
    assert of.guided("proxy:b,c,alpha=0.7", text) == near(expected)


@texts
def test_proxy_of_a_model_by_itself_changes_nothing(text):
    of = Setting()
    control = toy_request(of.beside, "proxy:tuned=b,base=b,alpha=3").controls[0]
    logits = of.after("a", text)
    assert np.array_equal(control.apply(logits, list(text)), logits)


@texts
def test_contrastive_is_the_expert_over_the_amateur_among_the_plausible(text):
    of = Setting()
    p, amateur = (softmax(of.after(m, text)) for m in "ab")
    expected = np.where(p >= 0.1 * p.max(), p * (p / amateur) ** 0.8, 0)
    found = of.guided("contrastive:b,alpha=0.1,beta=0.8", text)
    assert found == near(expected)


@texts
def test_cfg_is_a_power_of_the_ratio_to_the_other_prompt(text):
    of = Setting()
    other = of.after("a", [*of.beside.tokenizer.encode("xyz"), *text[3:]])
    p, q = softmax(of.after("a", text)), softmax(other)
    expected = q * (p / q) ** 2
    assert of.guided("cfg:negative=xyz,scale=2", text) == near(expected)
    # A JSON string is that text, and none is the last token of the prompt.
    assert of.guided(r'cfg:negative="\u0078yz",scale=2', text) == near(expected)
    q = softmax(of.after("a", text[2:]))
    expected = q * (p / q) ** 3
    assert of.guided("cfg:scale=3", text) == near(expected)


@texts
def test_cfg_of_scale_one_changes_nothing(text):
    of = Setting()
    control = toy_request(of.beside, "cfg:negative=xyz,scale=1").controls[0]
    logits = of.after("a", text)
    assert np.array_equal(control.apply(logits, list(text)), logits)


@texts
def test_cleangen_spreads_what_is_suspicious_by_the_reference(text):
    for temperature in (0.6, 1.0):
        of = Setting(temperature)
        p, q = (of.after(m, text) for m in "ab")
        suspicious = softmax(p) >= 1.5 * softmax(q)
        own, reference = softmax(p / temperature), softmax(q / temperature)
        expected = np.where(suspicious, 0, own) + own[suspicious].sum() * reference
        request = toy_request(of.beside, "cleangen:b,factor=1.5", PROMPT, temperature)
        logits = p
        for control in request.controls:  # the temperature, too
            logits = control.apply(logits, list(text))
        assert softmax(logits) == pytest.approx(expected, abs=1e-6)


@texts
def test_cleangen_is_the_papers_rule_when_greedy(text):
    of = Setting()
    p, q = (softmax(of.after(m, text)) for m in "ab")
    best = int(p.argmax())
    expected = int(q.argmax()) if p[best] >= 1.5 * q[best] else best
    assert int(of.guided("cleangen:b,factor=1.5", text).argmax()) == expected


def class_sums(of, text, score, first):
    """The scores of `text[first:]` in both classes, and those of what may follow."""
    sums, last = [], []
    for code in ("xy", "z"):
        begin = of.beside.tokenizer.encode(code)
        each = [score(of.after("b", [*begin, *text[:i]])) for i in range(first, len(text) + 1)]
        sums.append(sum(row[t] for row, t in zip(each, text[first:], strict=False)))
        last.append(each[-1])
    return sums, last


@texts
def test_gedi_is_bayes_rule_over_the_whole_text(text):
    of = Setting()
    sums, last = class_sums(of, text, lambda row: np.log(softmax(row)), 1)
    evidence = [np.exp(2 / len(text) * (s + row)) for s, row in zip(sums, last, strict=True)]
    class_prob = evidence[0] / (evidence[0] + evidence[1])
    expected = softmax(of.after("a", text)) * class_prob**3
    expected /= expected.sum()
    found = of.guided("gedi:b,xy,z,omega=3,alpha=2,rho=1", text)
    assert found == pytest.approx(expected, abs=1e-6)
    # With the filter: a token goes if it is among the least fitting 20 % and not fitting as such.
    below = np.array([expected[class_prob <= own].sum() for own in class_prob])
    kept = (below >= 0.2 - 1e-9) | (class_prob >= 0.5)
    if np.abs(below - 0.2).min() > 1e-6 and np.abs(class_prob - 0.5).min() > 1e-6:
        found = of.guided("gedi:b,xy,z,omega=3,alpha=2,rho=0.8,tau=0.5", text)
        assert np.array_equal(found > 0, kept)


@texts
def test_air_is_bayes_rule_over_reconstructed_chances_of_what_was_written(text):
    of = Setting()
    sums, last = class_sums(of, text, lambda row: np.log(-1 / np.log(softmax(row))), 3)
    evidence = [np.exp(s + row) for s, row in zip(sums, last, strict=True)]
    class_prob = evidence[0] / (evidence[0] + evidence[1])
    expected = softmax(of.after("a", text)) * class_prob**2
    assert of.guided("air:b,xy,z,omega=2", text) == near(expected)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(seed=st.integers(0, 2**32 - 1), forbidden=st.integers(0, 10))
@settings(max_examples=15, deadline=None)
def test_a_guide_is_pure_and_leaves_what_is_forbidden(spec, seed, forbidden):
    random = np.random.default_rng(seed)
    control = toy_request(ToyBeside(), spec, PROMPT).controls[0]
    assert isinstance(control, RunsModel)
    history = list(PROMPT)
    for _ in range(4):
        logits = random.normal(0, 3, 11).astype(np.float32)
        logits[:forbidden] = -np.inf
        copy = logits.copy()
        found = control.apply(logits, history)
        again = control.apply(logits, list(history))
        assert np.array_equal(found, again)
        assert np.array_equal(logits, copy)
        assert found.dtype == np.float32
        assert found.shape == (11,)
        assert not np.isnan(found).any()
        assert found.max() > -np.inf
        assert np.isneginf(found[:forbidden]).all()
        history.append(int(random.integers(11)))


# --------------------------------------------------------------------------------- DoLa


def jensen_shannon(p, q):
    def kl(a, b):
        return float((a * np.log(a / b)).sum())

    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_divergence_is_that_of_jensen_and_shannon(seed):
    rows = np.random.default_rng(seed).normal(0, 3, (4, 9))
    logs = np.log([softmax(row) for row in rows])
    found = divergence(logs[0], logs[1:])
    assert found == pytest.approx([jensen_shannon(softmax(rows[0]), softmax(r)) for r in rows[1:]])
    logs[0, 3:], logs[1:, :3] = -np.inf, -np.inf  # nothing in common
    logs[0] -= np.log(np.exp(logs[0]).sum())
    logs[1:] -= np.log(np.exp(logs[1:]).sum(1, keepdims=True))
    assert divergence(logs[0], logs[1:]) == pytest.approx(np.log(2))


def test_candidates_are_those_of_the_authors():
    assert candidates("low", 32, tied=False) == list(range(0, 16, 2))
    assert candidates("high", 32, tied=False) == list(range(16, 32, 2))
    assert candidates("low", 60, tied=True) == list(range(2, 20, 2))
    assert candidates("high", 60, tied=False) == list(range(40, 60, 2))
    assert candidates("3+0+3", 5, tied=True) == [0, 3]
    for count in range(1, 50):
        for text in ("low", "high"):
            for tied in (False, True):
                found = candidates(text, count, tied)
                assert found
                assert all(0 <= layers < count for layers in found)


@pytest.mark.parametrize("text", ["", "5", "-1", "1+", "last", "1,2", "²"])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(PacelineError, match=r"dola:layers is .* exits from 0 to 4"):
        candidates(text, 5, tied=True)


def test_dola_contrasts_with_the_farthest_exit():
    pytest.importorskip("torch").set_num_threads(1)  # so small a model only waits for a second
    from paceline import LM

    lm = LM(shared("models", "stories260K"), engine="reference", drafter="plain", budget=0)
    request = lm.request("Once upon a time", temperature=0, controls="", guide="dola:layers=0+1+3")
    history = list(request.prompt)
    for word in (410, 300, 17):
        sequence = lm.engine.start(np.array(history[:-1], np.int32))
        tree = TokenTree.root(history[-1])
        views = [View(layers=np.arange(n, dtype=np.int32)) for n in (0, 1, 3)]
        early = [softmax(lm.engine.forward([(sequence, tree)], view=v)[0]) for v in views]
        logits = lm.engine.forward([(sequence, tree)])[0]
        p = softmax(logits)
        q = max(early, key=lambda q: jensen_shannon(p, q))
        expected = np.where(p >= 0.1 * p.max(), p / q, 0)
        found = softmax(request.controls[0].apply(logits, history))
        assert found == near(expected)
        history.append(word)

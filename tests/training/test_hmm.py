"""Learning an HMM: it explains the texts ever better, and goes on where it was broken off."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.lexical.hmm import blank, read_hmm
from paceline.errors import ModelError, RequestError
from paceline.training.baum_welch import improve
from paceline.training.hmm import Distillation, HmmRecipe

RECIPE = HmmRecipe(states=4, samples=6, length=12, rounds=3, seed=1)


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="plain", engine="native", budget=0)


@given(st.integers(0, 1 << 30), st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_a_round_counts_what_every_path_would(seed, lengths):
    generator = np.random.default_rng(seed)
    hmm = blank(3, np.ones(4), seed)
    texts = [generator.integers(0, 4, length).astype(np.int32) for length in lengths]
    counts = [np.full(shape, 1e-3) for shape in [(3,), (3, 3), (3, 4)]]
    total = 0.0
    for text in texts:
        paths = list(itertools.product(range(3), repeat=len(text)))
        probs = []
        for path in paths:
            prob = hmm.initial[path[0]] * hmm.emission[path[0], text[0]]
            for place in range(1, len(text)):
                prob *= hmm.transition[path[place - 1], path[place]]
                prob *= hmm.emission[path[place], text[place]]
            probs.append(prob)
        total += np.log(sum(probs))
        for path, prob in zip(paths, np.array(probs) / sum(probs), strict=True):
            counts[0][path[0]] += prob
            for place, token in enumerate(text):
                counts[2][path[place], token] += prob
                if place:
                    counts[1][path[place - 1], path[place]] += prob
    better, likelihood = improve(hmm, texts)
    assert likelihood == pytest.approx(total / sum(lengths))
    for found, count in zip(
        (better.initial, better.transition, better.emission), counts, strict=True
    ):
        np.testing.assert_allclose(found, count / count.sum(-1, keepdims=True), rtol=1e-6)


def test_every_round_explains_the_texts_better():
    generator = np.random.default_rng(0)
    texts = [np.arange(n, n + 20, dtype=np.int32) % 7 for n in generator.integers(0, 7, 30)]
    hmm, found = blank(7, np.ones(7), 3), []
    for _ in range(30):
        hmm, likelihood = improve(hmm, texts)
        found.append(likelihood)
    assert (np.diff(found) > -1e-3).all()
    assert found[-1] > found[0] + 1  # of the log 7 = 1.9 there are


def test_an_hmm_of_a_model(lm, tmp_path):
    written, rounds = [], []
    work = Distillation(lm.engine, lm.model, tmp_path / "out", RECIPE)
    work.write(written.append)
    hmm, likelihood = work.learn(rounds.append)
    assert sum(written) >= RECIPE.tokens
    assert sum(rounds) == 3
    assert np.isfinite(likelihood)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = read_hmm(str(tmp_path / "out"), lm.tokenizer, lm.engine.config.vocab_size)
    np.testing.assert_allclose(found.emission, hmm.emission, rtol=1e-5)


def test_a_broken_off_distillation_goes_on(lm, tmp_path):
    class BrokenOffError(Exception):
        pass

    def whole(name):
        work = Distillation(lm.engine, lm.model, tmp_path / name, RECIPE)
        work.write()
        return work.learn()[0]

    def stop(count):
        if count == 1:
            raise BrokenOffError

    expected = whole("one")
    work = Distillation(lm.engine, lm.model, tmp_path / "two", RECIPE)
    work.write()
    with pytest.raises(BrokenOffError):
        work.learn(stop)
    assert (tmp_path / "two.work").exists()
    assert not (tmp_path / "two").exists()
    again = Distillation(lm.engine, lm.model, tmp_path / "two", RECIPE)
    written = []
    again.write(written.append)
    rounds = []
    hmm, _ = again.learn(rounds.append)
    assert rounds == [1, 1, 1]
    assert (hmm.transition == expected.transition).all()
    assert (hmm.emission == expected.emission).all()


def test_what_was_kept_of_another_recipe_is_refused(lm, tmp_path):
    work = Distillation(lm.engine, lm.model, tmp_path / "out", RECIPE)
    work.write()
    other = HmmRecipe(states=5, samples=6, length=12, rounds=3, seed=1)
    with pytest.raises(ModelError, match="belongs to other settings"):
        Distillation(lm.engine, lm.model, tmp_path / "out", other)
    (tmp_path / "out.work").write_bytes(b"x")
    with pytest.raises(ModelError):
        Distillation(lm.engine, lm.model, tmp_path / "out", RECIPE)


@pytest.mark.parametrize("name", ["states", "samples", "length", "rounds"])
def test_a_recipe_of_nothing_is_refused(name):
    with pytest.raises(RequestError, match=name):
        HmmRecipe(**{name: 0})

"""TransMLA: the latent is cached, the answers stay, and drafts change nothing."""

import numpy as np
import pytest

from paceline.abilities import Ability
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, RequestError
from paceline.lm import LM
from paceline.models import load
from tests.conftest import shared

MULTI_HEAD, GROUPED = "tinystories-instruct-3m-chat", "stories260K"


def compress(out, name, recipe):
    model = load(shared("models", name))
    tokens = np.random.default_rng(0).integers(3, 500, (4, 96))
    CompressionJob(model, out, parse_recipe(recipe)).run(Calibration(tokens, "noise"))
    return out


def logits(engine):
    rows = []
    ids = np.arange(5, 60, dtype=np.int32)
    engine.start(ids, lambda _, __, found: rows.append(found.copy()))
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("name", "recipe", "share"),
    [
        (MULTI_HEAD, "transmla", 0.5),  # exact: the hidden state is half of keys and values
        (GROUPED, "transmla", 1.0),  # exact: keys and values are the latent
        (GROUPED, "transmla:cache=0.5", 0.5),
    ],
)
def test_the_cache_holds_the_latent_and_the_answers_stay(tmp_path, name, recipe, share):
    out = compress(tmp_path / "out", name, recipe)
    model = load(out)
    original = load(shared("models", name))
    if recipe == "transmla":
        assert all(
            np.array_equal(model.weights.dense(each), original.weights.dense(each))
            for each in original.weights
        )
    latent = ReferenceEngine(model.config, model.weights)
    expanded = ReferenceEngine(model.config, model.weights.to_arrays())
    assert latent.memory.page_bytes == share * expanded.memory.page_bytes
    assert (Ability.EVICT in latent.abilities) == (share == 1)
    assert (Ability.KEYS in latent.abilities) == (share == 1)
    if share < 1:
        with pytest.raises(RequestError, match="cache latents"):
            latent.keys_values(latent.start([5, 6, 7]), 0)
    np.testing.assert_allclose(logits(latent), logits(expanded), atol=2e-4)


def test_drafts_and_copies_of_latents(tmp_path):
    out = compress(tmp_path / "out", MULTI_HEAD, "transmla")
    options = {"max_new_tokens": 30, "seed": 3, "temperature": 0.7}
    with LM(out, engine="reference", budget=8) as lm, LM(out, drafter="plain", budget=8) as native:
        drafted = lm.generate("Once upon a time", **options).text
        assert native.generate("Once upon a time", **options).text == drafted
        engine, ids = lm.engine, np.arange(5, 40, dtype=np.int32)
        sequence = engine.start(ids)
        other = engine.fork(sequence)
        engine.truncate(other, 20)
        assert engine.rows(other, 0).shape[1] == 20
        assert other.layers[0].shape[0] == 1
        engine.release(sequence)
        engine.release(other)
        assert engine.memory.used == 0


def test_a_rule_must_have_both(tmp_path):
    file = tmp_path / "half.toml"
    file.write_text('recipe = "rtn:group=32"\n[[rule]]\nmatch = "*.k"\nrecipe = "transmla"\n')
    with pytest.raises(MethodError, match="its rule leaves out v"):
        compress(tmp_path / "out", GROUPED, str(file))
    file.write_text(file.read_text().replace("*.k", "*.[kv]"))
    out = compress(tmp_path / "both", GROUPED, str(file))
    assert load(out).weights["layers.0.q"].bits == 4
    with pytest.raises(MethodError, match="not single matrices"):
        parse_recipe("transmla").steps.compressors[0].compress(None, None)

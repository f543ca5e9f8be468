"""A filter keeps the tokens that the first layers look at: both engines, and a plain reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import LM
from paceline.engines import open_engine
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.prompt_filter import _averaged, filter_part, kept_positions
from tests.conftest import shared

TEXT = (
    "Once upon a time there was a little dog named Max. He liked to run in the park. "
    "Lily saw a big red ball. Tom gave her a blue cup and she said thank you. "
)
MODEL = "stories260K"


@pytest.fixture(scope="module")
def model():
    return load(shared("models", MODEL))


@pytest.fixture(scope="module")
def ids(model):
    return model.tokenizer.encode(TEXT * 6)[:300]


def expected(model, ids, layer, keep, pool, first, last):
    """Run the whole model and choose in plain numpy, as the authors' program does."""
    engine = open_engine(model, "reference")
    sequence = engine.open()
    engine.track_queries(sequence, 1)
    engine.extend(sequence, np.array(ids, np.int32))
    queries = engine.recent_queries(sequence, layer)[:, 0]
    keys, _ = engine.keys_values(sequence, layer)
    group = len(queries) // len(keys)
    scores = sum(keys[head // group] @ query for head, query in enumerate(queries))
    padded = np.pad(scores, pool // 2)
    pooled = [padded[at : at + pool].mean() for at in range(len(ids))]
    ranked = sorted(range(len(ids)), key=lambda at: -pooled[at])
    always = [*range(first), *range(len(ids) - last, len(ids))]
    others = [at for at in ranked if at not in always]
    return sorted(always + others[: keep - len(always)])


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize(
    ("layer", "settings"),
    [(0, (40, 5, 1, 16)), (2, (64, 1, 0, 1)), (1, (100, 7, 3, 20))],
)
def test_it_keeps_what_the_authors_program_would(model, ids, name, layer, settings):
    keep, pool, first, last = settings
    part = filter_part(len(model.config.layers), layer)
    engine = open_engine(model, name, part=part)
    found = kept_positions(engine, ids, keep, pool=pool, first=first, last=last).tolist()
    wanted = expected(model, ids, layer, keep, pool, first, last)
    assert len(found) == len(set(found)) == keep
    assert len(set(found) & set(wanted)) >= keep - 1  # but for rounding
    assert engine.memory.used == 0


def test_only_the_first_layers_are_held(model):
    layers = len(model.config.layers)
    part = filter_part(layers, None)
    assert part.last == max(1, round(0.4 * layers)) < layers
    assert len(open_engine(model, "native", part=part).config.layers) == part.last
    with pytest.raises(RequestError, match=f"layer {layers} was asked for, and the model has 0 to"):
        filter_part(layers, layers)
    with pytest.raises(RequestError, match="layer -1"):
        filter_part(layers, -1)


def test_what_is_kept_is_a_prompt(ids):
    lm = LM(shared("models", MODEL), budget=8, drafter="recycle")
    kept = lm.filter_prompt(ids, 60, first=2, last=10)
    assert kept.length == len(ids)
    assert list(kept.tokens) == [ids[at] for at in kept.positions]
    assert list(kept.positions) == sorted(set(kept.positions))
    assert kept.positions[:2] == (0, 1)
    assert kept.positions[-10:] == tuple(range(290, 300))
    assert kept.text == lm.tokenizer.decode(kept.tokens)
    drafted = lm.generate(kept.tokens, max_new_tokens=20, temperature=0.8, seed=3)
    plain = LM(shared("models", MODEL), budget=0, drafter="plain")
    again = plain.filter_prompt(ids, 60, first=2, last=10)
    assert again == kept
    output = plain.generate(again.tokens, max_new_tokens=20, temperature=0.8, seed=3)
    assert output.tokens == drafted.tokens


def test_short_prompts_stay_whole(ids):
    lm = LM(shared("models", MODEL))
    kept = lm.filter_prompt(ids[:50], 50)
    assert (list(kept.tokens), kept.positions) == (ids[:50], tuple(range(50)))
    text = lm.filter_prompt(TEXT, 1000)
    assert list(text.tokens) == lm.encode(TEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 16}, "keep is 16, first 1 and last 16"),
        ({"last": 0}, "last 0"),
        ({"first": -1}, "first -1"),
        ({"pool": 2}, "pool is 2, expected an odd number"),
        ({"pool": -1}, "pool is -1"),
        ({"layer": 99}, "layer 99 was asked for"),
    ],
)
def test_bad_numbers_are_refused(ids, settings, message):
    with pytest.raises(RequestError, match=message):
        LM(shared("models", MODEL)).filter_prompt(ids, **{"keep": 64, **settings})


def test_prompts_that_cannot_be_filtered_are_refused(ids):
    lm = LM(shared("models", MODEL))
    with pytest.raises(RequestError, match="has 600 tokens, but the model sees 512"):
        lm.filter_prompt(ids * 2, 64)
    with pytest.raises(RequestError, match="the prompt is empty"):
        lm.filter_prompt([], 64)
    path = shared("models", MODEL)
    with pytest.raises(MethodError, match="in the native or the reference engine, and this engine"):
        LM(f"{path}|{path}").filter_prompt(ids, 64)


@given(
    scores=st.lists(st.floats(-9, 9), min_size=1, max_size=30),
    pool=st.sampled_from([1, 3, 5, 7, 41]),
)
def test_neighbours_are_averaged(scores, pool):
    found = _averaged(np.array(scores), pool)
    half = pool // 2
    wanted = [sum(scores[max(0, at - half) : at + half + 1]) / pool for at in range(len(scores))]
    np.testing.assert_allclose(found, wanted, atol=1e-9)

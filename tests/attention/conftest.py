"""A small real model, a text of it, and engines with attention patterns."""

import numpy as np
import pytest

from paceline.engines import open_engine
from paceline.models import load
from paceline.registry import patterns
from tests.conftest import shared

TEXT = (
    "Once upon a time there was a little dog named Max. He liked to run in the park. "
    "Lily saw a big red ball. Tom gave her a blue cup and she said thank you. "
)


@pytest.fixture(scope="module")
def model():
    return load(shared("models", "stories260K"))


@pytest.fixture(scope="module")
def story(model):
    """Return the first token ids of a story that repeats itself."""

    def first(size):
        return np.array(model.tokenizer.encode(TEXT * 12)[:size], np.int32)

    return first


@pytest.fixture(scope="module")
def opened(model):
    """Engines by pattern and settings, made once."""
    made = {}

    def get(spec, name="native", **options):
        key = (spec, name, *options.items())
        if key not in made:
            pattern = None if spec is None else patterns.parse(spec)
            made[key] = open_engine(model, name, pattern=pattern, **options)
        return made[key]

    return get


def run(engine, ids, chunk, prompt=0):
    """Return the logits of a text that is run in chunks, [S, vocabulary]."""
    rows = []
    sequence = engine.open()
    engine.set_prompt(sequence, prompt)
    engine.extend(sequence, ids, lambda _, __, logits: rows.append(logits.copy()), chunk)
    engine.release(sequence)
    return np.concatenate(rows)

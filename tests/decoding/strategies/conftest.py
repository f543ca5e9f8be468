import numpy as np
import pytest

from paceline.decoding.strategies.base import Task
from paceline.engines import open_engine
from paceline.models import load
from tests.conftest import shared

PROMPTS = ["Once upon a time", "The dog"]


@pytest.fixture(scope="session")
def stories():
    """A real small model."""
    return load(shared("models", "stories260K"))


@pytest.fixture(scope="session")
def engine(stories):
    return open_engine(stories, "native", threads=1)


@pytest.fixture(scope="session")
def prompts(stories):
    return [tuple(stories.tokenizer.encode(text)) for text in PROMPTS]


@pytest.fixture(scope="session")
def theirs():
    """The same model in transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(shared("models", "stories260K")).eval()


@pytest.fixture
def run(engine):
    """Runs a strategy on the real model."""
    return lambda strategy, request: strategy.run(Task(engine, request))


def log_probs(engine, tokens):
    """Log chances of the successor of `tokens`, slowly: the whole text is run again."""
    rows = []
    sequence = engine.start(np.array(tokens, np.int32), lambda _, __, got: rows.append(got.copy()))
    engine.release(sequence)
    logits = rows[-1][-1].astype(np.float64)
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())

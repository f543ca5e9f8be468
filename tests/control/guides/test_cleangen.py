"""CleanGen's horizon is a draft tree."""

import numpy as np
import pytest

from paceline.control.guides.base import guided, parse_guide
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.engines import open_engine
from paceline.models import load
from paceline.registry import drafters
from tests.conftest import shared
from tests.control.guides.laws import Models

HORIZON = "layer_skip:skip=none,width=1,depth={0},stop=depth"


@pytest.fixture(scope="module")
def models():
    """A model, and a reference of the same tokens."""
    names = {"a": "stories260K", "b": "bitstories-1M"}
    loaded = {name: load(shared("models", source)) for name, source in names.items()}
    engines = {name: open_engine(model, "native", threads=1) for name, model in loaded.items()}
    return Models(engines, loaded["a"].tokenizer)


def algorithm(models, prompt, limit, factor, k):
    """The paper's algorithm 1, greedy, over whole texts; tokens, and how often it checked."""
    text, checks = list(prompt), 0
    while len(text) < len(prompt) + limit:
        drafted = []
        for _ in range(min(k, len(prompt) + limit - len(text))):
            probs = models.after("a", text + [token for token, _ in drafted])
            drafted.append((int(probs.argmax()), probs.max()))
        checks += 1
        for token, prob in drafted:
            reference = models.after("b", text)
            suspicious = prob >= factor * reference[token]
            text.append(int(reference.argmax()) if suspicious else token)
            if suspicious:
                break
    return text[len(prompt) :], checks


@pytest.mark.parametrize("factor", [1.05, 1.5, 20])
@pytest.mark.parametrize("k", [1, 4])
def test_it_is_the_papers_algorithm_and_saves_the_references_passes(models, factor, k, monkeypatch):
    prompt, limit = models.tokenizer.encode("Once upon a time"), 20
    expected, checks = algorithm(models, prompt, limit, factor, k)
    target = Target(models.engine.config.vocab_size, models.engine, models.tokenizer)
    drafter = drafters.parse(HORIZON.format(k)).build(target)
    spec = parse_guide(f"cleangen:b,factor={factor}")
    request = guided(Request(tuple(prompt), limit), [spec], models)
    reference, passes = models.engines["b"], []

    def forward(batch, rows="all", view=None, original=reference.forward):
        passes.append(batch[0][1])
        return original(batch, rows, view)

    monkeypatch.setattr(reference, "forward", forward)
    output = Generation(models.engine, drafter, request, Fixed(k)).run()
    assert output.tokens == expected
    assert len(passes) - 1 == output.passes <= checks  # the prompt's apart
    if factor == 20:  # each pass of the reference checks k tokens, and gives one more
        assert np.ceil(limit / (k + 1)) == output.passes


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_those_of_token_by_token(models, seed):
    prompt = tuple(models.tokenizer.encode("The dog said"))
    target = Target(models.engine.config.vocab_size, models.engine, models.tokenizer)
    outputs = []
    for spec, budget in ((HORIZON.format(4), 4), ("plain", 0)):
        request = Request(prompt, 24, 1.0, seed, (Temperature(1.0),))
        request = guided(request, [parse_guide("cleangen:b,factor=3")], models)
        drafter = drafters.parse(spec).build(target)
        outputs.append(Generation(models.engine, drafter, request, Fixed(budget)).run())
    assert outputs[0].tokens == outputs[1].tokens
    assert outputs[0].passes < outputs[1].passes

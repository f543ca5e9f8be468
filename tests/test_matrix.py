"""Every drafter with every engine, temperature and sampler: the output is plain decoding's."""

import numpy as np
import pytest

from paceline.control.base import chain
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.engines import open_engine
from paceline.models import load
from paceline.registry import controls, drafters, required
from tests.conftest import shared

VARIANTS = [
    *sorted(
        name
        for name, method in drafters.methods().items()
        if not [*required(method), *method.needs]
    ),
    "recycle:tree=paper",
    "recycle:tree=static",
    "layers:skip=1+2,stop=bandit",
    "partial:sinks=2,recent=4,retrieved=16,least=1.0",
]
SAMPLERS = {
    "greedy": (0.0, ""),
    "warm": (0.7, "top_p:p=0.9"),
    "hot": (1.0, "min_p:p=0.02"),
    "penalised": (1.0, "repetition_penalty:penalty=1.2"),
}
PROMPTS = [
    "Once upon a time, there was a little girl named Lily.",
    "One day, a dog and a cat went to the park. The dog said",
]


@pytest.fixture(scope="module", params=["native", "reference"])
def setting(request):
    """An engine, its prompts as tokens, and plain outputs that were already made."""
    model = load(shared("models", "stories260K"))
    if request.param == "reference":
        pytest.importorskip("torch")
    engine = open_engine(model, request.param)
    return engine, [tuple(model.tokenizer.encode(prompt)) for prompt in PROMPTS], {}


def run(engine, drafter, prompt, sampler, seed, budget):
    heat, text = SAMPLERS[sampler]
    methods = [controls.parse(part) for part in filter(None, [text])]
    if heat:
        methods.append(Temperature(heat))
    request = Request(prompt, 40, heat, seed, chain(methods))
    return Generation(engine, drafter, request, Fixed(budget), margins=True).run()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_output_is_that_of_plain_decoding(setting, name, sampler):
    engine, prompts, plain = setting
    drafter = drafters.parse(name).build(Target(engine.config.vocab_size, engine))
    for seed, prompt in enumerate(prompts):
        key = (prompt, sampler)
        if key not in plain:
            nothing = drafters.parse("plain").build(Target(engine.config.vocab_size, engine))
            plain[key] = run(engine, nothing, prompt, sampler, seed, 0)
            assert plain[key].passes == 40
        output = run(engine, drafter, prompt, sampler, seed, budget=12)
        differs = np.flatnonzero(np.array(output.tokens) != np.array(plain[key].tokens))
        if len(differs):
            margin = plain[key].margins[differs[0]]
            assert not engine.invariant, f"token {differs[0]} differs, margin {margin}"
            assert margin <= engine.tolerance


def test_state_that_is_carried_changes_no_token(setting):
    engine, prompts, _ = setting
    for name in VARIANTS:
        drafter = drafters.parse(name).build(Target(engine.config.vocab_size, engine))
        first = run(engine, drafter, prompts[0], "hot", 3, 12)
        other = drafters.parse(name).build(Target(engine.config.vocab_size, engine))
        other.load(drafter.state())
        again = run(engine, other, prompts[0], "hot", 3, 12)
        if engine.invariant:
            assert again.tokens == first.tokens

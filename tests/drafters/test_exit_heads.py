"""Exits with an adapter: drafts by the first layers, outputs of the whole model."""

import dataclasses

import pytest
import torch

from paceline import LM
from paceline.drafters.heads.base import head_target, load_head, save_head
from paceline.drafters.heads.exit_adapter import ExitAdapter
from paceline.errors import MethodError
from paceline.training.head_loop import HeadRecipe
from paceline.training.heads import HeadTraining
from tests.conftest import shared

SMALL = shared("models", "stories260K")  # 5 layers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an exit behind the third layer, and its card."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    with LM(SMALL, drafter="plain", budget=0) as lm:
        recipe = HeadRecipe(tokens=2000, epochs=6, batch=64, rate=5e-3)
        training = HeadTraining(lm, ExitAdapter(layers=3, width=1), folder, recipe)
        prompts = [lm.tokenizer.encode(text) for text in ("Once upon a time", "The dog", "Lily")]
        training.write(prompts, lambda count: None)
        return folder, training.learn(lambda count: None)


def test_it_agrees_with_the_whole_model_more_than_the_bare_exit(trained, tmp_path):
    folder, card = trained
    assert card["right_at_1"] > 0.4
    with LM(SMALL, drafter="plain", budget=0) as lm:
        target = head_target(lm.model)
        loaded = load_head(folder, target)
        bare = {name: tensor * 0 for name, tensor in loaded.parameters.items()}
        save_head(tmp_path / "bare", loaded.head, bare, target, "")
    rates = []
    for head in (folder, tmp_path / "bare"):
        with LM(SMALL, drafter=f"head:path={head},stop=depth,depth=2", budget=4) as lm:
            rates.append(lm.generate("Once upon a time", max_new_tokens=60).tokens_per_pass)
    assert rates[0] > rates[1] > 1


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "drafter",
    ["head:path={}", "head:path={},stop=bandit,vocabulary=128", "blend:members=head:path={}"],
)
def test_the_output_is_plain_decodings(trained, engine, temperature, drafter):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
    accepted = 0
    with (
        LM(SMALL, engine=engine, drafter=drafter.format(trained[0]), budget=8) as drafting,
        LM(SMALL, engine=engine, drafter="plain", budget=0) as plain,
    ):
        for prompt in ("Once upon a time", "The dog"):
            found, expected = (each.generate(prompt, **options) for each in (drafting, plain))
            assert found.tokens == expected.tokens
            accepted += found.accepted.get("head", 0)
    assert accepted > 0 or drafter.startswith("blend")


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_the_rejection_walk_draws_from_its_probabilities(trained, engine):
    with LM(SMALL, engine=engine, drafter=f"head:path={trained[0]}", budget=4) as lm:
        found = lm.generate(
            "Once upon a time", max_new_tokens=30, temperature=1, walk="rejection", seed=1
        )
    assert found.accepted.get("head", 0) > 0


def test_a_batch_is_each_prompt_alone(trained):
    prompts = ["Once upon a time", "Lily had a cat. " * 8, "The dog"]
    options = {"max_new_tokens": 24, "temperature": 0.8, "seed": 5}
    with (
        LM(SMALL, drafter=f"head:path={trained[0]}", budget=6) as drafting,
        LM(SMALL, drafter="plain", budget=0) as plain,
    ):
        outputs = drafting.generate(prompts, **options)
        assert [each.tokens for each in outputs] == [
            plain.generate(prompt, **options).tokens for prompt in prompts
        ]


def test_an_exit_behind_the_last_layer_is_refused(trained, tmp_path):
    with LM(SMALL, drafter="plain", budget=0) as lm:
        with pytest.raises(MethodError, match="the exit is behind layer 5 of 5; give layers=1"):
            HeadTraining(lm, ExitAdapter(layers=5), tmp_path / "head", HeadRecipe())
        target = head_target(lm.model)
        loaded = load_head(trained[0], target)
        deeper = dataclasses.replace(loaded.head, layers=9)
        save_head(tmp_path / "deeper", deeper, loaded.parameters, target, "")
    with pytest.raises(MethodError, match="the exit is behind layer 9 of 5"):
        LM(SMALL, drafter=f"head:path={tmp_path / 'deeper'}")
    with pytest.raises(MethodError, match="exit_adapter:depth is 2"):
        ExitAdapter(depth=2)

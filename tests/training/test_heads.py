"""Training of heads: it learns, goes on where it was stopped, and refuses what cannot work."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.drafters.heads.base import CONFIG, head_target, load_head
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models.trace import read_trace, write_trace
from paceline.registry import heads
from paceline.training import heads as training
from paceline.training.head_loop import HeadRecipe
from paceline.training.heads import HeadTraining
from tests.conftest import shared

SPECS = (
    "medusa:depth=2",
    "medusa:depth=1,layers=2,output=own",
    "hydra:depth=2",
    "recurrent:depth=2,width=1",
    "eagle:depth=2,window=6",
    "chimera:depth=2,window=6",
    "exit_adapter:layers=2,width=1",
    "lookahead_embeddings:depth=3,mixed=64",
)


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), drafter="plain", budget=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(lm):
    return [lm.tokenizer.encode(text) for text in ("Once upon a time", "Lily had", "The dog")]


def train(lm, folder, spec=SPECS[2], progress=lambda count: None, **options):
    recipe = HeadRecipe(**{"tokens": 1200, "epochs": 12, "batch": 64, "rate": 1e-2} | options)
    work = HeadTraining(lm, heads.parse(spec), folder, recipe)
    work.write(prompts(lm), lambda count: None)
    return work.learn(progress)


@pytest.mark.parametrize("spec", SPECS)
def test_a_head_is_right_more_often_than_it_began_and_drafts(lm, tmp_path, spec):
    card = train(lm, tmp_path / "head", spec)
    untrained = train(lm, tmp_path / "none", spec, minutes=0)
    assert untrained["steps"] == 0
    assert card["held_out_nats"] < 0.8 * untrained["held_out_nats"]
    assert card["chain_tokens_per_pass"] > untrained["chain_tokens_per_pass"]
    assert not (tmp_path / "head.work").exists()
    loaded = load_head(tmp_path / "head", head_target(lm.model))
    assert loaded.head.spec() == heads.parse(spec).spec()
    assert 20 < len(loaded.frequent) <= lm.model.config.vocab_size
    for vocabulary in (0, 128):
        drafter = f"head:path={tmp_path / 'head'},vocabulary={vocabulary}"
        drafting = LM(lm.model.path, drafter=drafter, budget=6)
        found = drafting.generate("Once upon a time", max_new_tokens=48)
        assert found.tokens == lm.generate("Once upon a time", max_new_tokens=48).tokens
        assert found.accepted["head"] > 0


def test_a_training_that_was_stopped_goes_on_to_the_same_head(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_EVERY", 20)
    card = train(lm, tmp_path / "whole")
    stops, calls = 0, []

    def stop(count):
        calls.append(count)
        if len(calls) == 4 and stops < 3:
            raise KeyboardInterrupt

    while stops < 3:
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            train(lm, tmp_path / "parts", progress=stop)
        stops += 1
    again = train(lm, tmp_path / "parts", progress=stop)
    assert {**again, "seconds": 0} == {**card, "seconds": 0}
    one, other = (load_head(tmp_path / name, head_target(lm.model)) for name in ("whole", "parts"))
    for name, tensor in one.parameters.items():
        assert torch.equal(tensor, other.parameters[name])


def test_other_settings_do_not_go_on(lm, tmp_path):
    HeadTraining(lm, heads.parse(SPECS[0]), tmp_path / "head", HeadRecipe())
    HeadTraining(lm, heads.parse(SPECS[0]), tmp_path / "head", HeadRecipe(minutes=1))
    with pytest.raises(RequestError, match="belongs to another training"):
        HeadTraining(lm, heads.parse(SPECS[0]), tmp_path / "head", HeadRecipe(seed=1))
    (tmp_path / "head.work" / "job.json").write_text("{")
    with pytest.raises(RequestError, match="belongs to another training"):
        HeadTraining(lm, heads.parse(SPECS[0]), tmp_path / "head", HeadRecipe())


def test_answers_that_are_too_short_are_refused(lm, tmp_path):
    recipe = HeadRecipe(tokens=1000)
    work = HeadTraining(lm, heads.parse("medusa:depth=64"), tmp_path / "head", recipe)
    work.write(prompts(lm), lambda count: None)
    path = tmp_path / "head.work" / "answers.safetensors"
    trace = read_trace(path, lm.model.config.vocab_size)
    starts = np.arange(0, len(trace), 40, dtype=np.int32)
    write_trace(path, dataclasses.replace(trace, starts=starts))
    with pytest.raises(RequestError, match="too short or too few for a head of depth 64"):
        work.learn(lambda count: None)


@pytest.mark.parametrize(
    "options", [{"tokens": 10}, {"rate": float("nan")}, {"dropout": 1.0}, {"minutes": -1.0}]
)
def test_bad_numbers_are_refused(options):
    with pytest.raises(MethodError):
        HeadRecipe(**options)


@pytest.mark.parametrize("frequent", [[1, 1], [-1], [1 << 40], ["a"], 3, [True]])
def test_damaged_lists_of_frequent_tokens_are_refused(lm, tmp_path, frequent):
    train(lm, tmp_path / "head", minutes=0)
    path = tmp_path / "head" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frequent": frequent}))
    with pytest.raises(ModelError, match="a list `frequent` that does not hold"):
        load_head(tmp_path / "head", head_target(lm.model))

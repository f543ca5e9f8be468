"""Trained heads: files, refusals, learning, and outputs that are plain decoding's."""

import json

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.core import TokenTree
from paceline.drafters.heads.base import (
    CONFIG,
    TENSORS,
    HeadBatch,
    HeadTarget,
    load_head,
    save_head,
)
from paceline.drafters.heads.medusa import Medusa
from paceline.errors import MethodError, ModelError
from tests.conftest import shared

DEPTH = 3


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), engine="reference", drafter="plain", budget=0)


@pytest.fixture(scope="module")
def target(lm):
    embedding = torch.tensor(np.asarray(lm.model.weights["embed"], np.float32))
    unembedding = (
        embedding
        if lm.model.config.tied
        else torch.tensor(np.asarray(lm.model.weights["head"], np.float32))
    )
    config = lm.model.config
    return HeadTarget(config.hidden_size, config.vocab_size, embedding, unembedding)


def batch_of(lm, prompts):
    """The hidden states and next tokens of what the model writes."""
    hidden, tokens = [], []
    for prompt in prompts:
        output = lm.generate(prompt, max_new_tokens=60, temperature=0)
        ids = np.array([*lm.tokenizer.encode(prompt), *output.tokens], np.int32)
        sequence = lm.engine.open()
        lm.engine.forward([(sequence, TokenTree.chain(ids))])
        hidden.append(torch.tensor(lm.engine.hidden()[: -DEPTH - 1]))
        windows = np.lib.stride_tricks.sliding_window_view(ids[1:], DEPTH + 1)
        tokens.append(torch.tensor(windows.astype(np.int64)[: len(hidden[-1])]))
        lm.engine.release(sequence)
    return HeadBatch(torch.cat(hidden), torch.cat(tokens))


@pytest.fixture(scope="module")
def trained(lm, target, tmp_path_factory):
    """A folder with a head that learnt a few hundred positions of the model's own stories."""
    torch.manual_seed(0)
    head = Medusa(depth=DEPTH)
    parameters = {n: torch.zeros(s, requires_grad=True) for n, s in head.shapes(target).items()}
    prompts = ["Once upon a time", "Lily had a", "The dog", "One day, Tom", "There was a big"]
    batch = batch_of(lm, prompts)
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    first = head.loss(parameters, target, batch).item()
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(parameters, target, batch).backward()
        optimizer.step()
    assert head.loss(parameters, target, batch).item() < 0.7 * first
    folder = tmp_path_factory.mktemp("head")
    save_head(folder, head, parameters, target, lm.model.fingerprint())
    return folder


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", ["head:path={}", "blend:members=head:path={},ask=always"])
def test_the_output_is_plain_decodings(lm, trained, engine, temperature, drafter):
    options = {"max_new_tokens": 48, "temperature": temperature, "seed": 3}
    folder = shared("models", "stories260K")
    drafting = LM(folder, engine=engine, drafter=drafter.format(trained), budget=8)
    plain = LM(folder, engine=engine, drafter="plain", budget=0)
    for prompt in ("Once upon a time", "The dog"):
        found, expected = (each.generate(prompt, **options) for each in (drafting, plain))
        assert found.tokens == expected.tokens
        assert found.accepted.get("head", 0) > 0


def test_what_it_learnt_is_right_more_often(trained):
    folder = shared("models", "stories260K")
    found = LM(folder, drafter=f"head:path={trained}", budget=8).generate(
        "Once upon a time", max_new_tokens=60, temperature=0
    )
    assert found.tokens_per_pass > 1.15


def test_a_head_is_read_as_it_was_written(trained, target):
    loaded = load_head(trained, target)
    assert loaded.head == Medusa(depth=DEPTH)
    shapes = {n: tuple(t.shape) for n, t in loaded.parameters.items()}
    assert shapes == loaded.head.shapes(target)
    assert not len(loaded.frequent)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 7}, "for a model with vocab_size 7"),
        ({"hidden_size": None}, "for a model with hidden_size null"),
        ({"head": 3}, "names no head"),
        ({"head": "medusa:depth=2"}, "are not those of medusa:depth=2"),
    ],
)
def test_a_head_of_something_else_is_refused(trained, target, tmp_path, change, said):
    config = json.loads((trained / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    (tmp_path / TENSORS).write_bytes((trained / TENSORS).read_bytes())
    with pytest.raises(ModelError, match=said):
        load_head(tmp_path, target)


def test_values_that_are_not_finite_are_refused(trained, target, tmp_path):
    (tmp_path / CONFIG).write_bytes((trained / CONFIG).read_bytes())
    data = bytearray((trained / TENSORS).read_bytes())
    data[-4:] = b"\xff\xff\xff\xff"
    (tmp_path / TENSORS).write_bytes(bytes(data))
    with pytest.raises(ModelError, match="not finite"):
        load_head(tmp_path, target)


def test_missing_files_and_unknown_architectures_are_refused(trained, target, tmp_path):
    with pytest.raises(ModelError, match=CONFIG):
        load_head(tmp_path, target)
    config = json.loads((trained / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"head": "medusaa:depth=3"}))
    with pytest.raises(MethodError, match="did you mean medusa"):
        load_head(tmp_path, target)


def test_an_ensemble_is_refused(trained):
    folder = shared("models", "stories260K")
    with pytest.raises(MethodError, match="head needs an engine that returns hidden states"):
        LM(f"{folder}|{folder}", drafter=f"head:path={trained}")


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("drafter", ["head:path={}", "blend:members=head:path={},ask=always"])
def test_a_batch_with_a_head_is_each_prompt_alone(trained, engine, drafter):
    """Also where a pass holds parts of prompts only, which have no hidden states."""
    prompts = ["Once upon a time", "Lily had a cat. " * 8, "The dog"]
    options = {"max_new_tokens": 24, "temperature": 0.8, "seed": 5}
    path = shared("models", "stories260K")
    with LM(path, engine=engine, drafter=drafter.format(trained), budget=6) as drafting:
        outputs = drafting.generate(prompts, **options)
    with LM(path, engine=engine, drafter="plain", budget=0) as plain:
        assert [each.tokens for each in outputs] == [
            plain.generate(prompt, **options).tokens for prompt in prompts
        ]
    assert any("head" in output.accepted for output in outputs)

"""Trained inputs behind the last token: what the frozen model says there, and what is drafted."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.core import TokenTree
from paceline.drafters.heads.base import HeadBatch, head_target, save_head
from paceline.drafters.heads.lookahead_embeddings import LookaheadEmbeddings
from paceline.errors import MethodError
from paceline.models import blocks
from tests.conftest import shared

SMALL = shared("models", "stories260K")
HEAD = LookaheadEmbeddings(depth=4, mixed=16)


@pytest.fixture(scope="module")
def lm():
    with LM(SMALL, engine="reference", drafter="plain", budget=0) as lm:
        yield lm


@pytest.fixture(scope="module")
def target(lm):
    return head_target(lm.model)


@pytest.fixture(scope="module")
def folder(lm, target, tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "head"
    save_head(path, HEAD, HEAD.initial(target, 1), target, lm.model.fingerprint())
    return path


def chain_of(mix, root):
    """The tokens and weights of a chain: a token, then each input."""
    tokens = np.empty((len(mix) + 1, mix.shape[1] + 1), np.int32)
    tokens[:, 0], tokens[:, 1:] = root, HEAD.mixed_tokens(512)
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, 0], weights[1:, 1:] = 1, mix
    return tokens, weights


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1 << 30), cut=st.integers(1, 31))
def test_a_batch_is_each_position_with_its_inputs_behind_it(lm, target, seed, cut):
    """One masked pass over runs equals the engine's chain behind each text, cut at its start."""
    random = np.random.default_rng(seed)
    text = random.integers(0, 512, 32 + HEAD.depth)
    at = np.r_[:cut, cut + 100 : 132]  # the run holds parts of two texts
    windows = np.lib.stride_tricks.sliding_window_view(text, HEAD.depth + 1)[:32]
    batch = HeadBatch(
        torch.zeros(32, target.hidden_size),
        torch.from_numpy(windows.astype(np.int64)),
        at=torch.from_numpy(at.astype(np.int64)),
    )
    parameters = HEAD.initial(target, seed)
    found = torch.stack(HEAD.batch_logits(parameters, target, batch), 1).numpy()
    for place in {0, cut - 1, cut, 31}:
        begin = 0 if place < cut else cut
        sequence = lm.engine.open()
        before = text[begin:place].astype(np.int32)
        if len(before):
            lm.engine.forward([(sequence, TokenTree.chain(before))])
            lm.engine.commit(sequence, np.arange(len(before)))
        mixed = chain_of(parameters["mix"].numpy(), text[place])
        expected = lm.engine.forward_mixed(sequence, *mixed)
        lm.engine.release(sequence)
        # Positions count from the run's start there: rotary embeddings see distances only.
        assert np.abs(found[place] - expected).max() < 2e-3 * max(1, np.abs(expected).max())


def test_the_frozen_model_is_the_model(lm, target):
    tokens = torch.arange(3, 40)
    layers, outer = [{} for _ in lm.model.config.layers], {}
    for name in lm.model.weights:
        tensor = torch.from_numpy(np.array(lm.model.weights.dense(name), np.float32))
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layers[int(index)][rest] = tensor
        else:
            outer[name] = tensor
    expected = blocks.logits(tokens, lm.model.config, outer, layers)
    place = torch.arange(len(tokens))
    seen = (place[:, None] >= place)[None]
    states = target.frozen.states(target.embedding[tokens][None], place, seen)
    assert torch.allclose(states[0] @ target.unembedding.T, expected, atol=1e-4)


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "drafter", ["head:path={}", "head:path={},vocabulary=100", "blend:members=head:path={}"]
)
def test_the_output_is_plain_decodings(lm, folder, engine, temperature, drafter):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3}
    with LM(SMALL, engine=engine, drafter=drafter.format(folder), budget=6) as drafting:
        for prompt in ("Once upon a time", "The dog"):
            found = drafting.generate(prompt, **options)
            assert found.tokens == lm.generate(prompt, **options).tokens
            if drafter == "head:path={}" and not temperature:
                assert found.tokens_per_pass > 1.9  # the next token is what the model says itself


def test_it_drafts_up_to_the_end_of_the_context(folder, lm):
    with LM(SMALL, drafter=f"head:path={folder}", budget=6) as drafting:
        prompt = list(drafting.encode("Once upon a time" * 120))[
            : drafting.engine.config.context - 9
        ]
        found = drafting.generate(drafting.decode(prompt), max_new_tokens=30)
    assert found.tokens


def test_batches_are_each_prompt_alone(folder, lm):
    prompts = ["Once upon a time", "Lily had a cat. " * 8, "The dog"]
    with LM(SMALL, drafter=f"head:path={folder}", budget=6) as drafting:
        outputs = drafting.generate(prompts, max_new_tokens=16)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens == lm.generate(prompt, max_new_tokens=16).tokens


def test_the_rejection_walk_draws_from_its_probabilities(folder):
    with LM(SMALL, drafter=f"head:path={folder}", budget=4) as drafting:
        found = drafting.generate(
            "Once upon a time", max_new_tokens=30, temperature=1, walk="rejection", seed=1
        )
    assert found.accepted.get("head", 0) > 0


def test_what_cannot_work_is_refused(target):
    for wrong in ({"depth": 1}, {"mixed": 0}):
        with pytest.raises(MethodError):
            LookaheadEmbeddings(**wrong)
    batch = HeadBatch(torch.zeros(1, target.hidden_size), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(MethodError, match="trained through its model"):
        HEAD.batch_logits(HEAD.initial(target, 0), dataclasses.replace(target, frozen=None), batch)


@given(mixed=st.integers(1, 1 << 16), vocabulary=st.integers(1, 300_000))
def test_mixed_tokens_are_different_and_spread(mixed, vocabulary):
    tokens = LookaheadEmbeddings(mixed=mixed).mixed_tokens(vocabulary)
    assert len(tokens) == min(mixed, vocabulary)
    steps = np.diff(tokens)
    assert not len(steps) or (steps.min() >= 1 and np.ptp(steps) <= 1)
    assert tokens[-1] < vocabulary

"""Dual Chunk Attention: which distances it computes with, and that drafts change no token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.errors import MethodError
from paceline.lm import LM
from paceline.models import load
from paceline.models.blocks import rotate
from paceline.models.dual_chunk import score_change
from paceline.models.extension import extend_context
from tests.conftest import shared
from tests.engines.test_attention import CONFIG

MODEL = "stories260K"


def test_distances_are_those_of_the_paper() -> None:
    config = extend_context(CONFIG, "dual_chunk:factor=2,length=64")  # chunks of 48
    rope = config.layers[0].rope
    config = replace(config, attention_scale=1.0, attention_softcap=None)
    generator = torch.Generator().manual_seed(0)
    size = config.layers[0].head_dim
    query, key = (torch.randn(1, 1, size, generator=generator) for _ in range(2))
    plain = CONFIG.layers[0].rope

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        cos, sin = plain.table(position, position + 1)
        return rotate(x, torch.from_numpy(cos), torch.from_numpy(sin), plain.adjacent)

    # Positions of query and key, and the position that the query is turned by.
    for at, held, as_if in (
        (40, 7, 40),
        (50, 47, 50),  # the chunk before: 48 + 2
        (70, 10, 63),  # 48 + 22, but no more than 63
        (97, 47, 63),  # two chunks before
        (150, 100, 54),
        (150, 90, 63),
        (150, 145, 6),
    ):
        q, k = turned(query, at % 48), turned(key, held % 48)
        places = (torch.tensor([at]), torch.tensor([held]))
        scores = (q @ k.mT)[0] + score_change(q, k, *places, rope, config)
        wanted = (turned(query, as_if) @ turned(key, held % 48).mT)[0]
        torch.testing.assert_close(scores.reshape(1, 1), wanted, atol=1e-4, rtol=0)


def test_nothing_changes_within_a_chunk_and_any_pass_gives_the_same() -> None:
    model = load(shared("models", MODEL))
    config = extend_context(model.config, "dual_chunk:factor=2,length=96")  # chunks of 72
    tokens = np.random.default_rng(0).integers(3, 512, 240).astype(np.int32)
    longer = open_engine(replace(model, config=config), "reference")

    def run(engine, chunk: int) -> np.ndarray:
        rows: list[np.ndarray] = []
        sequence = engine.start(tokens, lambda _, __, logits: rows.append(logits.copy()), chunk)
        engine.release(sequence)
        return np.concatenate(rows)

    whole, plain = run(longer, 240), run(open_engine(model, "reference"), 240)
    np.testing.assert_allclose(whole[:72], plain[:72], atol=1e-4)
    assert np.abs(whole[150:] - plain[150:]).max() > 0.01
    np.testing.assert_allclose(run(longer, 50), whole, atol=1e-3)
    sequence = longer.start(tokens[:140])
    parents = np.array([-1, 0, 0, 2, 3], np.int32)
    ids = np.r_[tokens[140], 9, tokens[141:144]].astype(np.int32)
    tree = TokenTree(ids, parents, np.ones(5, np.float32), np.array([-1, 0, 0, 0, 0], np.int16))
    found = longer.forward([(sequence, tree)])[[0, 2, 3, 4]]
    np.testing.assert_allclose(found, whole[140:144], atol=1e-3)
    longer.release(sequence)


def test_drafts_change_no_token_beyond_the_trained_context() -> None:
    outputs = []
    for drafter, budget in (("plain", 1), ("recycle", 8)):
        options = {"engine": "reference", "rope": "dual_chunk:factor=2,length=64"}
        with LM(shared("models", MODEL), drafter=drafter, budget=budget, **options) as lm:
            done = lm.generate("Once upon", max_new_tokens=90, ignore_eos=True, temperature=0.0)
            outputs.append(done.tokens)
    assert outputs[0] == outputs[1]


def test_documents_end_within_the_first_chunk() -> None:
    options = {"engine": "reference", "rope": "dual_chunk:factor=2,length=64"}
    message = r"dual_chunk rotary scaling.*changes behind 48"
    with LM(shared("models", MODEL), **options) as lm, pytest.raises(MethodError, match=message):
        lm.generate("Who?", documents=["Once upon a time there was a cat. " * 12])

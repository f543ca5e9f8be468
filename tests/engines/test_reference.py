"""The reference engine against transformers, for every family, and against itself over trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers

from paceline.core import TokenTree
from paceline.engines.reference import ReferenceEngine
from paceline.errors import RequestError
from paceline.models import Model, load

TOLERANCE = 1e-4


def run(engine: ReferenceEngine, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits of every position, prefilled in chunks."""
    rows: list[np.ndarray] = []
    engine.release(engine.start(ids, lambda _, __, logits: rows.append(logits), chunk))
    return np.concatenate(rows)


@pytest.fixture(scope="module", params=tiny.MODELS)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, transformers.PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.save(request.param, folder)
    return load(folder), model


def open_reference(model: Model) -> ReferenceEngine:
    return ReferenceEngine(model.config, model.weights)


def test_logits_are_those_of_transformers(checkpoint) -> None:
    model, oracle = checkpoint
    ids = tiny.tokens(24)
    expected = tiny.oracle(oracle, ids)
    assert expected.std() > 0.1
    engine = open_reference(model)
    for chunk in (24, 7):
        np.testing.assert_allclose(run(engine, ids, chunk), expected, atol=TOLERANCE, rtol=0)


def test_tree_equals_its_branches(checkpoint) -> None:
    model, _ = checkpoint
    engine = open_reference(model)
    tree = TokenTree(
        tiny.tokens(8, seed=3),
        np.array([-1, 0, 0, 1, 1, 2, 3, 6], np.int32),
        np.ones(8, np.float32),
        np.zeros(8, np.int16),
    )
    prompt = tiny.tokens(9)
    sequence = engine.start(prompt)
    logits = engine.forward([(sequence, tree)])
    for leaf in (4, 5, 7):
        path = [leaf]
        while path[0]:
            path.insert(0, int(tree.parents[path[0]]))
        branch = run(engine, np.concatenate([prompt, tree.tokens[path]]), 64)[len(prompt) :]
        np.testing.assert_allclose(logits[path], branch, atol=TOLERANCE, rtol=0)
    engine.commit(sequence, [0, 1, 3])
    follow = engine.forward([(sequence, TokenTree.root(5))])
    whole = np.concatenate([prompt, tree.tokens[[0, 1, 3]], [5]])
    np.testing.assert_allclose(follow, run(engine, whole, 64)[-1:], atol=TOLERANCE, rtol=0)

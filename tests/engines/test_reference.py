"""The reference engine against transformers, for every family, and against itself over trees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tiny
from paceline.core import TokenTree
from paceline.engines.base import Cached
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, RequestError
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


def test_real_checkpoints(real_model: Path) -> None:
    model = load(real_model)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 100).astype(np.int32)
    expected = tiny.oracle(oracle.eval(), ids)
    found = run(open_reference(model), ids, 64)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ReferenceEngine:
    folder = tmp_path_factory.mktemp("gemma2")
    tiny.save("gemma2", folder)
    return open_reference(load(folder))


def next_logits(engine: ReferenceEngine, sequence: Cached) -> np.ndarray:
    return engine.forward([(sequence, TokenTree.root(9))])


def test_a_batch_is_its_sequences_one_by_one(engine: ReferenceEngine) -> None:
    prompts = [tiny.tokens(5, seed=1), tiny.tokens(11, seed=2)]
    trees = [TokenTree.chain([4, 5, 6]), TokenTree.root(7)]
    batch = list(zip(map(engine.start, prompts), trees, strict=True))
    alone = [engine.forward([pair]) for pair in batch]
    together = engine.forward(batch)
    assert together.shape == (4, tiny.VOCAB)
    assert np.array_equal(together, np.concatenate(alone))
    assert np.array_equal(engine.forward(batch, rows=[False, True]), alone[1])
    assert engine.forward(batch, rows="none").shape == (0, tiny.VOCAB)
    assert engine.forward([]).shape == (0, tiny.VOCAB)
    with pytest.raises(RequestError, match="1 trees, not 2"):
        engine.forward(batch, rows=[True])


def test_forward_commits_nothing(engine: ReferenceEngine) -> None:
    sequence = engine.start(tiny.tokens(6))
    before = next_logits(engine, sequence)
    engine.forward([(sequence, TokenTree.chain(range(3, 23)))])
    assert sequence.length == 6
    assert np.array_equal(next_logits(engine, sequence), before)


def test_truncate_and_fork(engine: ReferenceEngine) -> None:
    ids = tiny.tokens(12)
    sequence = engine.start(ids)
    other = engine.fork(sequence)
    engine.truncate(sequence, 7)
    assert (sequence.length, other.length) == (7, 12)
    shorter = next_logits(engine, engine.start(ids[:7]))
    np.testing.assert_allclose(next_logits(engine, sequence), shorter, atol=1e-5)
    engine.extend(sequence, ids[:3])
    np.testing.assert_allclose(
        next_logits(engine, other), next_logits(engine, engine.start(ids)), atol=1e-5
    )
    with pytest.raises(RequestError, match="cannot cut 12 positions to 13"):
        engine.truncate(other, 13)


def test_refusals(engine: ReferenceEngine) -> None:
    sequence = engine.start(tiny.tokens(tiny.CONTEXT - 2))
    engine.forward([(sequence, TokenTree.chain([3, 4]))])
    with pytest.raises(RequestError, match="leaves the 2 nodes"):
        engine.commit(sequence, [0, 2])
    with pytest.raises(RequestError, match="context of 64"):
        engine.forward([(sequence, TokenTree.chain([3, 4, 5]))])
    for token in (-1, tiny.VOCAB):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            engine.forward([(sequence, TokenTree.root(token))])
    engine.release(sequence)
    engine.release(sequence)
    with pytest.raises(RequestError, match="released"):
        next_logits(engine, sequence)


def test_unknown_device(engine: ReferenceEngine) -> None:
    for name in ("abacus", "cuda:99"):
        with pytest.raises(MethodError, match="torch cannot use the device"):
            ReferenceEngine(engine.config, {}, device=name)


def test_bf16_is_near(tmp_path: Path) -> None:
    model = tiny.save("qwen3-mixed", tmp_path)
    loaded = load(tmp_path)
    engine = ReferenceEngine(loaded.config, loaded.weights, dtype=torch.bfloat16)
    ids = tiny.tokens(12)
    difference = np.abs(run(engine, ids, 5) - tiny.oracle(model, ids))
    assert engine.format == "bf16"
    assert 0 < difference.max() < 0.3


def test_nothing_else_imports_torch() -> None:
    code = "import sys, paceline.models, paceline.engines.base; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

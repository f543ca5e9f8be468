"""The static engine against the reference engine: any tree, any length, any family."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from paceline import LM
from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.engines.factory import open_engine
from paceline.engines.reference import ReferenceEngine
from paceline.engines.static import SIZES, StaticEngine
from paceline.engines.static_pass import pass_numbers
from paceline.engines.view import View
from paceline.errors import MethodError, RequestError
from paceline.models import Model, load
from paceline.serving.worker import Worker

TOLERANCE = 1e-4
# Windows and soft caps, learned positions, a parallel block, partial rotation, norms of each head.
FAMILIES = ("gemma2", "gemma3_text", "gpt2", "gpt_neox-sequential", "ministral3", "llama-dynamic")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        tiny.save(name, folder)
    return {name: load(folder) for name, folder in folders.items()}


def tree_of(tokens: list[int], parents: list[int]) -> TokenTree:
    n = len(tokens)
    return TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.full(n, -1, np.int16),
    )


def random_tree(random: np.random.Generator, nodes: int) -> TokenTree:
    parents, tokens = [-1], [3]
    for node in range(1, nodes):
        parents.append(int(random.integers(0, node)))
        siblings = {tokens[i] for i in range(node) if parents[i] == parents[node]}
        tokens.append(next(t for t in random.permutation(tiny.VOCAB).tolist() if t not in siblings))
    return tree_of(tokens, parents)


def path_of(tree: TokenTree, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(tree.parents[node])
    return path[::-1]


def walk(engine: Engine, seed: int) -> list[np.ndarray]:
    """Logits of passes over random trees, with commits, cuts and copies between them."""
    random = np.random.default_rng(seed)
    sequence = engine.start(tiny.tokens(int(random.integers(1, 9)), seed=seed))
    rows = []
    for _ in range(12):
        tree = random_tree(random, int(random.integers(1, 14)))
        rows.append(engine.forward([(sequence, tree)]))
        engine.commit(sequence, path_of(tree, int(random.integers(0, len(tree)))))
        step = random.integers(0, 4)
        if step == 0:
            engine.truncate(sequence, int(random.integers(1, sequence.length + 1)))
        elif step == 1:
            copied = engine.fork(sequence)
            engine.release(sequence)
            sequence = copied
        if sequence.length > 45:
            engine.truncate(sequence, 5)
    engine.release(sequence)
    return rows


def test_passes_agree_with_the_reference_engine(models: dict[str, Model]) -> None:
    for seed, (name, model) in enumerate(models.items()):
        reference = ReferenceEngine(model.config, model.weights)
        static = StaticEngine(model.config, model.weights, sizes=(1, 3, 6, 13))
        for _ in range(2):  # the second time in memory that holds old rows
            for ours, expected in zip(walk(static, seed), walk(reference, seed), strict=True):
                np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0, err_msg=name)


def test_trees_of_1_to_80_nodes_take_the_smallest_pass(models: dict[str, Model]) -> None:
    model = models["gemma2"]
    static, reference = (
        kind(model.config, model.weights) for kind in (StaticEngine, ReferenceEngine)
    )
    sequences = [engine.start(tiny.tokens(4)) for engine in (static, reference)]
    random = np.random.default_rng(0)
    for nodes in (1, 2, 3, 9, 17, 33, 64, 80):
        tree = random_tree(random, nodes)
        if tree.depths().max() + 4 >= tiny.CONTEXT:
            continue
        pairs = zip((static, reference), sequences, strict=True)
        ours, expected = (engine.forward([(sequence, tree)]) for engine, sequence in pairs)
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(static.hidden(), reference.hidden(), atol=TOLERANCE, rtol=0)
    [slot] = [sequences[0].slot]  # type: ignore[attr-defined]
    used = {size for size, _ in slot.passes}
    assert used == {1, 2, 4, 12, 24, 48, 64, 80}
    assert used <= set(SIZES)


def test_a_padded_node_changes_no_row(models: dict[str, Model]) -> None:
    model = models["gemma2"]
    engine = StaticEngine(model.config, model.weights, sizes=(8,))
    sequence = engine.start(tiny.tokens(6))
    tree = TokenTree.chain([5, 6, 7])
    first = engine.forward([(sequence, tree)])
    longer = engine.forward([(sequence, TokenTree.chain([5, 6, 7, 9, 11]))])
    assert np.array_equal(first, longer[:3])
    assert np.array_equal(engine.forward([(sequence, tree)]), first)


def test_numbers_of_a_pass() -> None:
    tree = tree_of([7, 8, 9], [-1, 0, 0])
    numbers = pass_numbers(tree, 10, 4, 100)
    assert numbers[:4].tolist() == [7, 8, 9, 7]
    assert numbers[4:8].tolist() == [10, 11, 11, 10]
    assert numbers[8:12].tolist() == [10, 11, 12, 103]
    assert numbers[12] == 10
    assert numbers[13:].reshape(4, 4).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 0],
    ]


def test_views_run_as_in_the_reference_engine(models: dict[str, Model]) -> None:
    model = models["gemma2"]
    view = View(layers=np.array([0, 2], np.int32), tokens=np.array([3, 9], np.int32))
    rows = []
    for kind in (StaticEngine, ReferenceEngine):
        engine = kind(model.config, model.weights)
        sequence = engine.start(tiny.tokens(6))
        rows.append(engine.forward([(sequence, TokenTree.chain([5, 6]))], view=view))
    np.testing.assert_allclose(*rows, atol=TOLERANCE, rtol=0)


def test_slots_are_used_again(models: dict[str, Model]) -> None:
    model = models["gemma2"]
    engine = StaticEngine(model.config, model.weights, capacity=32)
    first = engine.start(tiny.tokens(6))
    slot = first.slot  # type: ignore[attr-defined]
    engine.release(first)
    engine.release(first)
    second = engine.start(tiny.tokens(3))
    assert second.slot is slot  # type: ignore[attr-defined]
    del second  # without a release
    assert engine.start(tiny.tokens(3)).slot is slot  # type: ignore[attr-defined]


def test_refusals(models: dict[str, Model]) -> None:
    model = models["gemma2"]
    engine = StaticEngine(model.config, model.weights, capacity=10)
    sequence = engine.start(tiny.tokens(9))
    assert engine.config.context == 10
    with pytest.raises(RequestError, match="context of 10"):
        engine.forward([(sequence, TokenTree.chain([3, 4]))])
    wide = random_tree(np.random.default_rng(0), 82)
    with pytest.raises(RequestError, match="9 positions and 82 nodes are more than the 90 rows"):
        engine._run(sequence, wide, True, View())  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="kv_limit"):
        engine.kv_limit = 1 << 30
    with pytest.raises(MethodError, match="sizes is"):
        StaticEngine(model.config, model.weights, sizes=(4, 2))
    with pytest.raises(MethodError, match="capacity is 0"):
        StaticEngine(model.config, model.weights, capacity=0)
    with pytest.raises(RequestError, match="attention"):
        engine.track_attention(engine.open())
    with pytest.raises(MethodError, match="torch has threads of its own"):
        open_engine(model, "static", threads=2)
    with pytest.raises(MethodError, match="no format 'int8'"):
        open_engine(model, "static", weight_format="int8")


def test_drafted_text_is_plain_text() -> None:
    lm = LM(engine="static", drafter="recycle", budget=8)
    plain = LM(engine="static", drafter="plain")
    prompt = "Once upon a time"
    ours, expected = (one.generate(prompt, max_new_tokens=24).tokens for one in (lm, plain))
    assert list(ours) == list(expected)


def test_requests_run_one_by_one() -> None:
    lm = LM(engine="static", drafter="plain")
    prompts = ["Once upon a time", "The"]
    together = lm.generate(prompts, max_new_tokens=4)
    alone = [lm.generate(prompt, max_new_tokens=4) for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    with pytest.raises(MethodError, match="cannot share a limit of memory"):
        Worker(lm)

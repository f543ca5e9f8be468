"""Random passes over random trees."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from paceline.core import Request, Step, TokenTree


def asked(prompt: Iterable[int], **options: object) -> Request:
    """A request for 32 tokens after `prompt`."""
    return Request(prompt=tuple(prompt), max_new_tokens=32, **options)


def random_step(
    random: np.random.Generator, tree: TokenTree, context: list[int], vocab: int, k: int
) -> Step:
    """A pass over `tree` by a model that thinks at random, and some walk."""
    logits = random.normal(0, 2, (len(tree), vocab))
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    top = np.argsort(-probs, axis=1)[:, :k].astype(np.int32)
    path, drawn = [0], []
    while True:
        token = int(top[path[-1], 0]) if random.random() < 0.3 else _some_child(tree, path[-1])
        drawn.append(token)
        child = tree.child(path[-1], token)
        if child is None:
            break
        path.append(child)
    return Step(
        np.array(context, np.int32),
        tree,
        top,
        np.take_along_axis(probs, top, axis=1).astype(np.float32),
        np.array(path, np.int32),
        np.array(drawn, np.int32),
    )


def _some_child(tree: TokenTree, node: int) -> int:
    children = np.flatnonzero(tree.parents == node)
    return int(tree.tokens[children[0]]) if len(children) else 0


def check_tree(tree: TokenTree, root: int, budget: int, vocab: int, origins: int = 1) -> None:
    """What the contract asks beyond what `TokenTree` checks itself."""
    assert 1 <= len(tree) <= budget + 1
    assert tree.tokens[0] == root
    assert tree.tokens.min() >= 0
    assert tree.tokens.max() < vocab
    assert ((tree.scores >= 0) & (tree.scores <= 1)).all()
    assert tree.origin[0] == -1
    assert ((tree.origin[1:] >= 0) & (tree.origin[1:] < origins)).all()
    assert tree.tokens.dtype == tree.parents.dtype == np.int32
    assert tree.scores.dtype == np.float32

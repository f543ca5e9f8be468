"""Token Recycling as published, and its static tree."""

import numpy as np
import pytest

from paceline.core import Step, TokenTree
from paceline.drafters.base import Target
from paceline.drafters.token_recycling import LEVELS, RANKS, paper_shape, static_shape
from paceline.registry import drafters


def depths(shape):
    return [len(range(*level.indices(len(shape.parents)))) for level in shape.levels]


def probs(shape):
    paths = [1.0]
    for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
        paths.append(paths[parent] * RANKS[rank])
    return paths[1:]


def test_the_papers_tree_has_its_levels_and_leans_to_rank_0():
    shape = paper_shape(80)
    assert depths(shape) == list(LEVELS)
    children = np.bincount(shape.parents[1:])
    assert children[0] == 8
    assert children[1] == max(children[1:])
    assert paper_shape(1000).parents.tolist() == shape.parents.tolist()


@pytest.mark.parametrize("make", [paper_shape, static_shape])
@pytest.mark.parametrize("budget", [0, 1, 4, 16, 79])
def test_shapes_have_the_budget_and_parents_come_first(make, budget):
    shape = make(budget)
    assert len(shape.parents) == budget + 1
    assert (shape.parents[1:] < np.arange(1, budget + 1)).all()
    edges = set(zip(shape.parents.tolist(), shape.ranks.tolist(), strict=True))
    assert len(edges) == budget + 1


def test_no_tree_of_the_size_is_likelier_than_the_static_one():
    shape = static_shape(30)
    inside = probs(shape)
    paths = [1.0, *inside]
    taken = set(zip(shape.parents.tolist(), shape.ranks.tolist(), strict=True))
    outside = [
        paths[node] * p
        for node in range(len(paths))
        for rank, p in enumerate(RANKS)
        if (node, rank) not in taken
    ]
    assert max(outside) <= min(inside)
    assert sum(inside) > sum(probs(paper_shape(30))) - 1e-9


def observe(drafter, tokens, top):
    tree = TokenTree.chain(tokens)
    nodes = np.arange(len(tree), dtype=np.int32)
    top = np.array(top, np.int32)
    drafter.observe(
        Step(tree.tokens[:1], tree, top, np.full(top.shape, 0.1, np.float32), nodes, nodes)
    )


@pytest.mark.parametrize("tree", ["paper", "static"])
def test_rows_are_overwritten_at_every_node(tree):
    drafter = drafters.parse(f"token_recycling:tree={tree}").build(Target(100))
    assert drafter.top_k == 8
    rows = [[10 * i + j for j in range(8)] for i in range(3)]
    observe(drafter, [1, 2, 1], rows)  # 1 is seen twice: the last stays
    context = np.array([5, 1], np.int32)
    first = drafter.propose(context, 8)
    assert first.tokens[first.parents == 0].tolist() == rows[2][: (first.parents == 0).sum()]
    observe(drafter, [1], [list(range(50, 58))])
    again = drafter.propose(context, 8)
    assert again.tokens[1] == 50
    assert again.scores[1] == np.float32(RANKS[0])


def test_unknown_successors_leave_their_subtree_out():
    drafter = drafters.parse("token_recycling").build(Target(100))
    observe(drafter, [1], [[2, 3, 4, 5, 6, 7, 8, 9]])
    observe(drafter, [3], [[20, 21, 22, 23, 24, 25, 26, 27]])
    tree = drafter.propose(np.array([1], np.int32), 80)
    inner = {int(tree.tokens[p]) for p in tree.parents[1:]}
    assert inner == {1, 3}


def test_a_vocabulary_below_eight():
    drafter = drafters.parse("token_recycling:tree=static").build(Target(3))
    assert drafter.top_k == 3
    observe(drafter, [1], [[2, 0, 1]])
    assert len(drafter.propose(np.array([1], np.int32), 80)) > 3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import Cost, Output, Step, TokenTree


def tree(tokens, parents):
    n = len(tokens)
    return TokenTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.ones(n, np.float32),
        np.zeros(n, np.int16),
    )


@st.composite
def trees(draw, vocabulary=50, most=20):
    n = draw(st.integers(1, most))
    tokens, parents, used = [draw(st.integers(0, vocabulary - 1))], [-1], set()
    for node in range(1, n):
        parent = draw(st.integers(0, node - 1))
        token = draw(st.integers(0, vocabulary - 1))
        if (parent, token) in used:
            break
        used.add((parent, token))
        tokens.append(token)
        parents.append(parent)
    return tree(tokens, parents)


@pytest.mark.parametrize(
    ("tokens", "parents", "said"),
    [
        ([], [], "root"),
        ([1, 2], [-1], "one size"),
        ([1], [0], r"parents\[0\]"),
        ([1, 2], [-1, 1], "before"),
        ([1, 2], [-1, -1], "before"),
        ([1, 2, 2], [-1, 0, 0], "siblings"),
        ([1, 2, 3, 2], [-1, 0, 0, 0], "siblings"),
    ],
)
def test_broken_trees_are_refused(tokens, parents, said):
    with pytest.raises(ValueError, match=said):
        TokenTree(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.ones(len(tokens), np.float32),
            np.zeros(len(tokens), np.int16),
        )


def test_the_same_token_may_stand_under_different_parents():
    assert tree([1, 2, 2], [-1, 0, 1]).child(1, 2) == 2


@given(trees(), st.integers(0, 20))
def test_cut_keeps_exactly_the_shallow_nodes(whole, depth):
    cut = whole.cut(depth)
    kept = np.flatnonzero(whole.depths() <= depth)
    assert cut.tokens.tolist() == whole.tokens[kept].tolist()
    assert cut.depths().tolist() == whole.depths()[kept].tolist()
    for place, node in enumerate(kept[1:], 1):
        assert kept[cut.parents[place]] == whole.parents[node]


def test_chain():
    chain = TokenTree.chain([5, 6, 7], score=0.5)
    assert chain.depths().tolist() == [0, 1, 2]
    assert chain.origin.tolist() == [-1, 0, 0]
    assert chain.child(0, 6) == 1
    assert chain.child(0, 7) is None
    assert len(TokenTree.root(3)) == 1


def test_a_step_checks_its_shapes():
    root = TokenTree.root(1)
    one, top = np.array([0], np.int32), np.zeros((1, 2), np.int32)
    Step(one, root, top, top.astype(np.float32), one, one)
    with pytest.raises(ValueError, match="row"):
        Step(one, root, np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32), one, one)
    with pytest.raises(ValueError, match="path"):
        Step(one, root, top, top.astype(np.float32), np.array([1], np.int32), one)


def test_cost_interpolates_between_what_was_measured():
    cost = Cost((1, 4), (1.0, 4.0))
    assert cost.at(2) == 2.0
    assert cost.at(100) == 4.0
    with pytest.raises(ValueError, match="increasing"):
        Cost((4, 1), (1.0, 2.0))


def test_output_without_passes_divides_by_nothing():
    assert Output().tokens_per_pass == 0.0
    assert Output().tokens_per_second == 0.0


def test_a_trusted_tree_is_the_same_and_a_root_is_a_chain_of_one():
    chain = TokenTree.chain([4, 5, 6], score=0.5)
    trusted = TokenTree.trusted(chain.tokens, chain.parents, chain.scores, chain.origin)
    for tree, other in ((trusted, chain), (TokenTree.root(7), TokenTree.chain([7]))):
        for name in ("tokens", "parents", "scores", "origin"):
            ours, theirs = getattr(tree, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()
    with pytest.raises(ValueError, match="read-only"):
        TokenTree.root(7).scores[0] = 0.5

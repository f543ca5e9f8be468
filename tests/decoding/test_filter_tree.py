"""Drafts narrowed by controls that know more than the drafter."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.capabilities import ExtendsDrafts
from paceline.core import TokenTree
from paceline.decoding.filter_tree import filter_tree
from tests.test_core import trees

HISTORY = [5, 6]


class Odd:
    """Lets odd tokens through; after a 7 come 1, 1, 1."""

    def allows(self, history, tree):
        return self.extensions(history, tree)[0]

    def extensions(self, history, tree):
        assert history == HISTORY
        kept, chains = np.zeros(len(tree), bool), {}
        for node in range(len(tree)):
            parent = tree.parents[node]
            after = node and parent and tree.tokens[parent] == 7
            odd = tree.tokens[node] == 1 if after else tree.tokens[node] % 2 == 1
            kept[node] = not node or (kept[parent] and odd)
        for node in range(1, len(tree)):
            below = (tree.parents == node) & kept
            if kept[node] and tree.tokens[node] == 7 and not below.any():
                chains[node] = [1, 1, 1]
        return kept, chains


class Small:
    """Lets tokens below 10 through."""

    def allows(self, history, tree):
        kept = tree.tokens < 10
        for node in range(len(tree)):
            kept[node] = not node or (kept[node] and kept[tree.parents[node]])
        return kept


def paths(tree):
    found = [()]
    for node in range(1, len(tree)):
        found.append((*found[tree.parents[node]], int(tree.tokens[node])))
    return found


@given(trees(most=24), st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_what_is_left_is_allowed_and_what_must_follow_is_there(tree, max_nodes):
    assert isinstance(Odd(), ExtendsDrafts)
    assert not isinstance(Small(), ExtendsDrafts)
    found = filter_tree(tree, [Odd(), Small()], HISTORY, max_nodes)
    assert len(found) <= max_nodes + 1
    assert found.tokens[0] == tree.tokens[0]
    wide = filter_tree(tree, [Odd(), Small()], HISTORY, 1000)
    assert set(paths(found)) <= set(paths(wide))
    path_probs = dict(zip(paths(wide), wide.scores.tolist(), strict=True))
    for path in paths(wide)[1:]:
        assert 0.0 <= path_probs[path] <= 1.0
        assert all(token % 2 and token < 10 for token in path)
    given_paths = set(paths(tree))
    for path in paths(wide):
        if path not in given_paths:
            assert path_probs[path] == 1.0
            assert path[-1] == 1
    for path in set(paths(wide)) & given_paths:
        if path and path[-1] == 7:
            assert any(other[:-1] == path for other in paths(wide))


def test_siblings_share_what_a_dropped_one_had():
    tokens, parents = np.array([3, 2, 5, 7], np.int32), np.array([-1, 0, 0, 0], np.int32)
    scores = np.array([1.0, 0.5, 0.3, 0.1], np.float32)
    tree = TokenTree(tokens, parents, scores, np.array([-1, 0, 1, 2], np.int16))
    found = filter_tree(tree, [Odd()], HISTORY, 9)
    assert found.tokens.tolist() == [3, 5, 7, 1, 1, 1]
    assert found.parents.tolist() == [-1, 0, 0, 2, 3, 4]
    np.testing.assert_allclose(found.scores, [1, 0.6, 0.2, 1, 1, 1], rtol=1e-6)
    assert found.origin.tolist() == [-1, 1, 2, 2, 2, 2], "a chain is of who guessed its node"
    assert filter_tree(tree, [Odd()], HISTORY, 2).tokens.tolist() == [3, 5, 7]


def test_without_controls_nothing_changes():
    tree = TokenTree.chain([1, 2, 3])
    assert filter_tree(tree, [], HISTORY, 9) is tree
    assert filter_tree(tree, [Small()], HISTORY, 9) is tree

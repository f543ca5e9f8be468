import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.engines.follower import Follower
from tests.test_core import trees
from tests.toy import ToyEngine

TEXT = st.lists(st.integers(0, 10), min_size=1, max_size=24)


def after(engine, tokens):
    return engine.logits_after([int(token) for token in tokens])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TEXT, st.booleans(), trees(vocabulary=11)), min_size=1, max_size=6))
def test_logits_are_those_of_the_text_whatever_was_run_before(rounds):
    engine = ToyEngine(order=64)
    follower = Follower(engine)
    text = []
    for new, goes_on, tree in rounds:
        text = (text + new)[:48] if goes_on else new
        context = np.array([*text, tree.tokens[0]], np.int32)
        logits = follower.run(context, tree)
        for node in range(len(tree)):
            path, above = [], node
            while above > 0:
                path.append(int(tree.tokens[above]))
                above = tree.parents[above]
            assert np.array_equal(logits[node], after(engine, [*context, *path[::-1]]))
    follower.reset()
    assert engine.opened == 0


def test_rows_that_were_run_are_not_run_again():
    engine, run = ToyEngine(), []
    forward = engine.forward

    def counting(batch, rows="all", view=None):
        run.append([tree.tokens.tolist() for _, tree in batch])
        return forward(batch, rows, view)

    engine.forward = counting
    follower = Follower(engine)
    follower.follow(np.array([1, 2, 3], np.int32))
    follower.run(np.array([1, 2, 3], np.int32), TokenTree.chain([3, 4, 5]))
    follower.run(np.array([1, 2, 3, 4, 6], np.int32), TokenTree.root(6))
    follower.run(np.array([1, 2, 9], np.int32), TokenTree.root(9))
    assert run == [[[1, 2]], [[3, 4, 5]], [[6]], [[9]]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.integers(0, 20))
def test_what_is_read_in_parts_is_what_is_read_at_once(text, most):
    engine, sizes = ToyEngine(order=64), []
    forward = engine.forward

    def watching(batch, rows="all", view=None):
        sizes.append(len(batch[0][1]))
        return forward(batch, rows, view)

    engine.forward = watching
    follower, context = Follower(engine), np.array(text, np.int32)
    follower.paced = True
    while late := follower.behind(context):
        assert follower.room(context) == -1
        assert follower.follow(context, most) == min(most, late)
        if not most:
            break
    assert all(size <= most for size in sizes)
    if most:
        assert follower.follow(context, most) == 0
        logits = follower.run(context, TokenTree.root(text[-1]))
        assert np.array_equal(logits[0], after(engine, context))
    follower.reset()
    assert engine.opened == 0


def test_an_interrupted_pass_leaves_no_trace():
    engine = ToyEngine(order=64)
    follower = Follower(engine)
    forward = engine.forward

    def interrupted(batch, rows="all"):
        if batch[0][0].length == 256:
            raise KeyboardInterrupt
        return forward(batch, rows)

    engine.config = ToyEngine(context=1024).config
    engine.forward = interrupted
    text = (np.arange(600) % 11).astype(np.int32)
    with pytest.raises(KeyboardInterrupt):
        follower.follow(text)
    engine.forward = forward
    logits = follower.run(text[:300], TokenTree.root(int(text[299])))
    assert np.array_equal(logits[0], after(engine, text[:300]))


def test_no_room_beyond_the_context_or_the_vocabulary():
    follower = Follower(ToyEngine(context=8))
    assert follower.room(np.array([1] * 8, np.int32)) == 0
    assert follower.room(np.array([1] * 9, np.int32)) == -1
    assert follower.room(np.array([1, 11], np.int32)) == -1

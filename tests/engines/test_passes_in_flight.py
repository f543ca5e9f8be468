"""Passes that are under way together: every bit is that of one engine, whichever node is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline.core import TokenTree
from paceline.engines.native import NativeEngine
from paceline.engines.part import Part
from paceline.engines.pipeline import PipelineEngine
from paceline.errors import MemoryFullError, RequestError
from paceline.models import load
from tests.engines.test_native import path_to, trees
from tests.engines.threaded_nodes import ThreadedNodes

PARTS = ([Part(0, 1, 3), Part(1, 3, 3)], [Part(0, 1, 3), Part(1, 2, 3), Part(2, 3, 3)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save("llama-gqa-tied-bias", folder)
    found = load(folder)
    return replace(found.config, context=512), found.weights


@pytest.fixture(scope="module")
def whole(model):
    return NativeEngine(*model, threads=1)


def pipeline(model, parts=PARTS[1], **options):
    """A pipeline whose nodes are threads."""

    def load_part(index):
        return NativeEngine(*model, part=parts[index], threads=1)

    nodes = ThreadedNodes(load_part)
    return PipelineEngine(model[0], load_part(len(parts) - 1), nodes, len(parts) - 1, **options)


class Pair:
    """One engine, and a pipeline with several passes under way, that are told the same."""

    def __init__(self, whole, split):
        self.whole, self.split = whole, split
        self.idle, self.flights, self.lost = [], [], 0
        self.open()

    def open(self):
        self.idle.append((self.whole.open(), self.split.open()))

    def begin(self, data):
        if not self.idle:
            return
        chosen = data.draw(st.sets(st.integers(0, len(self.idle) - 1), min_size=1))
        batch = [(self.idle[i], data.draw(trees(30))) for i in sorted(chosen)]
        batch = [(both, tree) for both, tree in batch if both[0].length + len(tree) <= 512]
        self.idle = [both for i, both in enumerate(self.idle) if i not in chosen]
        rows = [data.draw(st.booleans()) for _ in batch]
        begun = self.split.begin([(theirs, tree) for (_, theirs), tree in batch], rows)
        self.flights.append((begun, batch, rows))

    def finish(self, data):
        if not self.flights:
            return
        begun, batch, rows = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        if data.draw(st.integers(0, 5)) == 0:
            self.split.abandon(begun)
            self.idle += [both for both, _ in batch]
            return
        kept = [data.draw(st.integers(0, 5)) > 0 for _ in batch]
        for keep, (both, _) in zip(kept, batch, strict=True):
            if keep:
                self.idle.append(both)
            else:  # its request has left meanwhile
                self.whole.release(both[0])
                self.split.release(both[1])
        found = self.split.finish(begun, kept).copy()
        batch = [each for each, keep in zip(batch, kept, strict=True) if keep]
        rows = [each for each, keep in zip(rows, kept, strict=True) if keep]
        if batch:
            expected = self.whole.forward([(ours, tree) for (ours, _), tree in batch], rows)
            np.testing.assert_array_equal(found, expected)
            if any(rows):
                np.testing.assert_array_equal(self.split.hidden(), self.whole.hidden())
        for (ours, theirs), tree in batch:
            if data.draw(st.booleans()):
                path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
                self.whole.commit(ours, path)
                self.split.commit(theirs, path)

    def fork(self, data):
        every = [*self.idle, *(both for _, batch, _ in self.flights for both, _ in batch)]
        if every:
            ours, theirs = data.draw(st.sampled_from(every))
            self.idle.append((self.whole.fork(ours), self.split.fork(theirs)))

    def cut(self, data):
        if self.idle:
            ours, theirs = data.draw(st.sampled_from(self.idle))
            length = data.draw(st.integers(0, ours.length))
            self.whole.truncate(ours, length)
            self.split.truncate(theirs, length)

    def lose(self, data):
        stage = data.draw(st.sampled_from(self.split._stages))
        self.lost += stage.lost is None
        stage.lose()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_under_way_and_lost_every_bit_is_that_of_one_engine(data, model, whole):
    split = pipeline(model, data.draw(st.sampled_from(PARTS)))
    pair = Pair(whole, split)
    steps = ("open", "begin", "begin", "finish", "finish", "fork", "cut", "lose")
    for _ in range(data.draw(st.integers(4, 24))):
        step = data.draw(st.sampled_from(steps))
        pair.open() if step == "open" else getattr(pair, step)(data)
    while pair.flights:
        pair.finish(data)
    for ours, theirs in pair.idle:
        assert ours.length == theirs.length
        root = TokenTree.root(3)
        np.testing.assert_array_equal(
            whole.forward([(ours, root)]), split.forward([(theirs, root)])
        )
        whole.release(ours)
        split.release(theirs)
    assert split.memory.used == 0
    last = split.open()
    split.forward([(last, TokenTree.root(1))])
    assert split.replaced == pair.lost  # no replacement was ever told what it could not do
    assert [stage.runner.engine.memory.used for stage in split._stages] == [1] * len(split._stages)
    split.close()


def test_a_pass_that_was_computed_survives_the_node_that_computed_it(model, whole):
    split = pipeline(model)
    one, other = split.start(tiny.tokens(70)), split.start(tiny.tokens(90))
    first = split.begin([(one, TokenTree.chain([5, 6, 7]))])
    split.forward([(other, TokenTree.root(1))])  # behind the first on every node
    split._stages[0].lose()
    split.forward([(split.open(), TokenTree.root(1))])  # notices
    assert split.replaced == 1
    split.finish(first)
    split.commit(one, [0, 1])
    split.commit(other, [0])
    root = TokenTree.root(3)
    found = split.forward([(one, root), (other, root)])
    assert (split.replaced, split._stages[0].lost) == (1, None)
    texts = [*tiny.tokens(70), 5, 6], [*tiny.tokens(90), 1]
    for text, row in zip(texts, found, strict=True):
        expected = whole.forward([(whole.start(np.array(text, np.int32)), root)])
        np.testing.assert_array_equal(expected[0], row)
    split.close()


def test_hidden_states_of_a_pass_in_pieces_are_those_of_all(model, whole):
    split = pipeline(model)
    trees_of = [TokenTree.chain(tiny.tokens(size)) for size in (70, 80, 90)]
    rows = [True, False, True]
    ours = [(whole.start(tiny.tokens(9)), tree) for tree in trees_of]
    theirs = [(split.start(tiny.tokens(9)), tree) for tree in trees_of]
    np.testing.assert_array_equal(split.forward(theirs, rows), whole.forward(ours, rows))
    np.testing.assert_array_equal(split.hidden(), whole.hidden())
    split.close()


def test_a_full_memory_fails_one_pass(model, whole):
    split = pipeline(model)
    split.kv_limit = 2 * split.memory.page_bytes
    one, two, three = (split.open() for _ in range(3))
    root = TokenTree.root(1)
    first, second = split.begin([(one, root), (two, root)]), split.begin([(three, root)])
    split.finish(first)
    with pytest.raises(MemoryFullError):
        split.finish(second)
    split.release(one)
    expected = whole.forward([(whole.open(), root)])
    np.testing.assert_array_equal(split.forward([(three, root)]), expected)
    split.close()


def test_what_a_pass_under_way_forbids_is_refused(model, whole):
    split = pipeline(model, passes_in_flight=2)
    assert split.passes_in_flight == 2
    sequence, root = split.start(tiny.tokens(9)), TokenTree.root(1)
    begun = split.begin([(sequence, root)])
    for refused in (
        lambda: split.begin([(sequence, root)]),
        lambda: split.commit(sequence, [0]),
        lambda: split.truncate(sequence, 0),
    ):
        with pytest.raises(RequestError, match="finish that first"):
            refused()
    split.finish(begun)
    with pytest.raises(RequestError, match="was finished"):
        split.finish(begun)
    split.abandon(begun)  # harmless
    for refused in (lambda: whole.begin([]), lambda: whole.finish(begun)):
        with pytest.raises(RequestError, match="one pass at a time"):
            refused()
    split.close()

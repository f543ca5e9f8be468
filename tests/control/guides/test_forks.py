"""Forks of a guide: each follows a text of its own, and answers as if it were alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.capabilities import Forkable
from paceline.control.guides.base import run_trees_together
from paceline.core import TokenTree
from paceline.errors import MemoryFullError
from tests.control.guides.beside_toy import SPECS, ToyBeside, toy_request
from tests.test_core import trees

PROMPT = (1, 2, 3)
STEPS = st.one_of(
    st.tuples(st.just("grow"), st.integers(0, 9), st.integers(0, 10)),
    st.tuples(st.just("fork"), st.integers(0, 9), st.integers(0, 10)),
    st.tuples(st.just("jump"), st.integers(0, 9), st.lists(st.integers(0, 10), max_size=9)),
    st.tuples(st.just("end"), st.integers(0, 9), st.just(0)),
)


def alone(spec, text):
    """The guided logits of a text, by a guide that was asked nothing before but its beginnings."""
    beside = ToyBeside()
    guide = toy_request(beside, spec, PROMPT).controls[0]
    for size in range(len(PROMPT), len(text) + 1):
        found = guide.ranking_logits(beside.engine.logits_after(text[:size]), text[:size])
    return found


@pytest.mark.parametrize("name", SPECS)
@given(steps=st.lists(STEPS, max_size=12), tree=trees(vocabulary=11))
@settings(max_examples=12, deadline=None)
def test_each_fork_answers_as_if_it_were_alone(name, steps, tree):
    beside = ToyBeside()
    first = toy_request(beside, SPECS[name], PROMPT).controls[0]
    assert isinstance(first, Forkable)
    first.begin(beside.engine.open())
    texts = {first: list(PROMPT)}

    def ask():
        """Every text is looked at, in one pass of each stream, and asked about."""
        asked = [(guide, np.array(text, np.int32)) for guide, text in texts.items()]
        run_trees_together([(guide, text, TokenTree.root(int(text[-1]))) for guide, text in asked])
        for guide, text in texts.items():
            found = guide.ranking_logits(beside.engine.logits_after(text), text)
            assert np.array_equal(found, alone(SPECS[name], text))

    ask()
    for step, which, new in steps:
        guide = list(texts)[which % len(texts)]
        if step == "grow":
            texts[guide].append(new)
        elif step == "fork" and len(texts) < 4:
            text = [*texts[guide], new]
            texts[guide.fork(np.array(text, np.int32), None)] = text
            texts[guide].append((new + 1) % 11)
        elif step == "jump" and not guide.append_only:
            texts[guide] = [*PROMPT, *new]
        elif step == "end" and len(texts) > 1:
            guide.release()
            del texts[guide]
        if any(len(text) > 40 for text in texts.values()):
            break
        if first.append_only and step != "fork":
            for each in texts:  # every text is asked about at every length
                if each is not guide or step != "grow":
                    texts[each].append(new if step == "grow" else 1)
        ask()
    for guide in texts:
        guide.release()
    assert beside.opened == 1  # the sequence that stood for the target's


def test_a_tree_for_each_of_several_texts_costs_one_pass():
    beside = ToyBeside()
    first, context = (
        toy_request(beside, SPECS["gedi"], PROMPT).controls[0],
        np.array(PROMPT, np.int32),
    )
    first.begin(beside.engine.open())
    first.run_tree(context, TokenTree.root(3))
    second = first.fork(np.array([*PROMPT, 4], np.int32), beside.engine.open())
    passes, forward = [], beside.engines["b"].forward

    def counting(batch, rows="all", view=None):
        passes.append([len(tree) for _, tree in batch])
        return forward(batch, rows, view)

    beside.engines["b"].forward = counting
    run_trees_together(
        [
            (first, context, TokenTree.chain([3, 4, 5])),
            (second, np.append(context, np.int32(4)), TokenTree.root(4)),
        ]
    )
    assert passes == [[3, 1], [3, 1]]  # one for each class
    for guide, text in ((first, [*PROMPT, 4, 5]), (second, [*PROMPT, 4])):
        found = guide.apply(beside.engine.logits_after(text), text)
        assert np.array_equal(found, alone(SPECS["gedi"], text))
    assert len(passes) == 2


def test_a_fork_that_finds_no_room_leaves_nothing_open():
    beside = ToyBeside()
    guide = toy_request(beside, SPECS["proxy"], PROMPT).controls[0]
    guide.begin(beside.engine.open())
    guide.run_tree(np.array(PROMPT, np.int32), TokenTree.root(3))
    opened = beside.opened

    def full(sequence):
        raise MemoryFullError("no page is left")

    beside.engines["c"].fork = full  # `b` has forked then
    with pytest.raises(MemoryFullError):
        guide.fork(np.array(PROMPT, np.int32), None)
    assert beside.opened == opened
    text = list(PROMPT)
    found = guide.ranking_logits(beside.engine.logits_after(text), text)
    assert np.array_equal(found, alone(SPECS["proxy"], text))


def test_what_is_released_can_be_begun_again_and_forks_begin_where_they_are():
    beside = ToyBeside()
    guide = toy_request(beside, SPECS["proxy"], PROMPT).controls[0]
    run, forward = [], beside.engines["b"].forward

    def counting(batch, rows="all", view=None):
        run.extend(len(tree) for _, tree in batch)
        return forward(batch, rows, view)

    beside.engines["b"].forward = counting
    guide.begin(beside.engine.open())
    guide.run_tree(np.array(PROMPT, np.int32), TokenTree.root(3))
    longer = np.array([*PROMPT, 5], np.int32)
    fork = guide.fork(longer, None)
    fork.begin(beside.engine.open())
    fork.run_tree(longer, TokenTree.root(5))
    assert sum(run) == 4  # every token once
    guide.release()
    guide.begin(beside.engine.open())
    guide.run_tree(np.array(PROMPT, np.int32), TokenTree.root(3))
    assert sum(run) == 7

"""`predicted_output`: following a prediction through edits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.errors import MethodError, RequestError
from paceline.registry import drafters
from tests.drafters.steps import asked, check_tree
from tests.toy import ToyEngine


def build(vocab=1000, **changes):
    spec = ",".join(f"{name}={value}" for name, value in changes.items())
    return drafters.parse(f"predicted_output:{spec}").build(Target(vocab))


def follow(output, prediction, budget=8, drafter=None):
    """Passes that it takes to say `output`, one token a pass when nothing is guessed."""
    drafter = drafter or build()
    context, passes = [0], 0
    drafter.begin(asked(context, prediction=tuple(prediction)))
    while len(context) <= len(output):
        tree = drafter.propose(np.array(context, np.int32), budget)
        check_tree(tree, context[-1], budget, 1000)
        node: int | None = 0
        while node is not None and len(context) <= len(output):
            context.append(output[len(context) - 1])
            node = tree.child(node, context[-1])
        passes += 1
    return passes


TEXT = list(range(100, 180))


def test_what_comes_true_takes_one_pass_for_each_tree():
    assert follow(TEXT, TEXT) == 9  # 80 tokens by 8 + 1


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ([*TEXT[:40], 7, 8, 9, *TEXT[40:]], 16),  # inserted
        (TEXT[:40] + TEXT[45:], 14),  # deleted
        ([*TEXT[:40], 7, 8, 9, *TEXT[43:]], 16),  # replaced, as many
        ([*TEXT[:40], 7, *TEXT[50:]], 14),  # replaced by fewer
        (TEXT[40:] + TEXT[:40], 14),  # moved
    ],
)
def test_edits_cost_a_few_passes(said, passes):
    assert follow(said, TEXT) <= passes
    assert follow(said, []) == len(said)


def test_places_that_look_alike_are_branches():
    drafter = build()
    prediction = [1, 2, 50, 3, 1, 2, 60, 4]
    drafter.begin(asked([9], prediction=tuple(prediction)))
    tree = drafter.propose(np.array([9, 3, 1, 2], np.int32), 8)
    assert {60, 50} <= set(tree.tokens[tree.parents == 0].tolist())
    assert tree.tokens[1] == 60  # the longer match


def test_inserted_and_replaced_are_branches_where_the_texts_part():
    drafter = build()
    drafter.begin(asked([9], prediction=(1, 2, 3, 4, 5)))
    tree = drafter.propose(np.array([9, 1, 2, 77], np.int32), 8)
    assert set(tree.tokens[tree.parents == 0].tolist()) == {3, 4}


def test_chances_are_learnt():
    drafter = build()
    before = drafter.state()["chances"]
    follow(TEXT, TEXT, drafter=drafter)
    after = drafter.state()["chances"]
    assert (after >= before).all()
    assert after.max() > 0.98
    drafter.reset()
    follow([5] * 80, TEXT, drafter=drafter)
    assert (drafter.state()["chances"] <= before).all()
    assert drafter.state()["chances"].sum() < before.sum()


@settings(deadline=None, max_examples=40)
@given(
    prediction=st.lists(st.integers(0, 10), max_size=30),
    branches=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_prediction_leaves_the_output_as_it_is(prediction, branches, seed):
    for temperature in (0.0, 1.0):
        request = Request((1, 2), 30, temperature, seed, prediction=tuple(prediction))

        def run(name, request=request):
            drafter = drafters.parse(name).build(Target(11))
            return Generation(ToyEngine(), drafter, request, Fixed(9)).run().tokens

        assert run(f"predicted_output:branches={branches}") == run("plain")


def test_no_prediction_is_plain_decoding():
    drafter = build()
    drafter.begin(asked([1, 2]))
    assert len(drafter.propose(np.array([1, 2], np.int32), 8)) == 1


def test_a_new_request_does_not_see_the_old_prediction():
    drafter = build()
    follow(TEXT, TEXT, drafter=drafter)
    drafter.begin(asked([99]))
    assert len(drafter.propose(np.array([99, 100], np.int32), 8)) == 1


def test_predictions_out_of_bounds_are_refused():
    with pytest.raises(RequestError, match="capacity=3"):
        build(capacity=3).begin(asked([1], prediction=(1, 2, 3, 4)))
    for token in (1000, -1):
        with pytest.raises(RequestError, match="outside"):
            build().begin(asked([1], prediction=(token,)))


def test_states_with_impossible_chances_are_refused():
    state = build().state()
    state["chances"][0, 0] = float("nan")
    with pytest.raises(MethodError, match="impossible chances"):
        build().load(state)

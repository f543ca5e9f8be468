"""Forecasts by hand, and facts that survive their JSON or are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.planning.cost_model import Slowdown, forecast, share_reached
from paceline.planning.draft_gains import THRESHOLDS, likely_passes, passes_needed, tree_sizes
from paceline.planning.measured_facts import (
    NO_DRAFTS,
    DraftFacts,
    EngineFacts,
    PromptFacts,
    ReadFacts,
)
from paceline.planning.setups import Goal, Setup

PAGES = {"fp32": 64_000, "fp16": 32_000, "int8": 18_000}
ENGINE = EngineFacts("int8", 10**8, (1, 17), (0.01, 0.02), 1e-5, 1e-3, 2, PAGES, 1000)
DRAFTS = DraftFacts(tuple(np.linspace(1, 2, 17)), 0.001, 0.0005, 0.0, 500, 0, 0)
PROMPTS = PromptFacts(100, 50)  # 125 cached positions in the mean


def said(setup, drafts=NO_DRAFTS, goal=None, slowdown=None, **reads):
    slowdown = slowdown or Slowdown()
    return forecast(setup, ENGINE, drafts, PROMPTS, goal or Goal(), slowdown, **reads)


def test_plain_speed_is_that_of_a_pass_over_one_node():
    plain = said(Setup("m", drafter="plain", budget=0))
    assert plain.tokens_per_second == pytest.approx(1 / (0.01 + 125e-5))
    assert plain.first_token == pytest.approx(100 * 1e-3 + 0.01 + 100e-5)
    assert plain.memory == 10**8 + 3 * 64_000 + 2 * 4 * 1000


def test_a_budget_is_the_one_that_pays_most():
    auto = said(Setup("m"), DRAFTS)
    fixed = [said(Setup("m", budget=n), DRAFTS).tokens_per_second for n in range(17)]
    assert auto.tokens_per_second == pytest.approx(max(fixed))
    assert auto.nodes == int(np.argmax(fixed)) == 16
    assert fixed[16] == pytest.approx(2 / (0.02 + 125e-5 + 0.001 + 0.0005))


def test_a_drafter_that_does_not_pay_rests():
    slow = DraftFacts(DRAFTS.gained, 1.0)
    assert said(Setup("m"), slow).nodes == 0


def test_an_automatic_budget_is_as_fast_as_it_was_measured():
    setup, best = Setup("m"), 2 / (0.02 + 125e-5 + 0.001 + 0.0005)
    measured = replace(DRAFTS, automatic=1.25 / best)
    reached = share_reached(setup, ENGINE, measured, PROMPTS)
    assert reached == pytest.approx(0.8)
    assert said(setup, measured, reached=reached).tokens_per_second == pytest.approx(0.8 * best)
    sure = DraftFacts((1.0, 2.0), 0.0001, 0.0005)
    together = [said(setup, sure, Goal(users=4), reached=share) for share in (1, 0.8, 0.01)]
    plain = said(Setup("m", drafter="plain", budget=0), sure, Goal(users=4))
    speeds = [each.tokens_per_second for each in (*together, plain)]
    assert speeds[0] > speeds[1] > speeds[2] == pytest.approx(speeds[3])
    slower = replace(measured, reference=0.01).timed(0.02)  # the machine is half as fast
    assert slower.automatic == pytest.approx(2 * measured.automatic)
    assert share_reached(setup, ENGINE, DRAFTS, PROMPTS) == 1
    assert share_reached(Setup("m", budget=4), ENGINE, measured, PROMPTS) == 1


def test_smaller_caches_take_less_time_and_memory():
    whole, small = (said(Setup("m", "auto", "plain", 0, kv), NO_DRAFTS) for kv in ("auto", "int8"))
    assert small.tokens_per_second == pytest.approx(1 / (0.01 + 125e-5 * 18 / 64))
    assert whole.memory - small.memory == 3 * (64_000 - 18_000)


def test_a_policy_bounds_memory_and_what_a_pass_reads():
    goal = Goal(context=4096)
    bounded = said(
        Setup("m", kv_policy="sliding_window:budget=64,every=16", drafter="plain"), goal=goal
    )
    whole = said(Setup("m", drafter="plain"), goal=goal)
    assert whole.memory - bounded.memory == (65 - 2) * 64_000
    assert bounded.tokens_per_second == pytest.approx(1 / (0.01 + 80e-5))


def test_a_pattern_reads_less_and_keeps_more():
    whole = said(Setup("m", drafter="plain"))
    few = said(Setup("m", drafter="plain", attention="quest"), reads=ReadFacts(0.2, 1000))
    assert few.tokens_per_second == pytest.approx(1 / (0.01 + 0.2 * 125e-5))
    assert few.memory - whole.memory == 1000 * 3


def test_users_share_passes_and_have_caches_of_their_own():
    one, four = (said(Setup("m", drafter="plain"), goal=Goal(users=n)) for n in (1, 4))
    assert one.tokens_per_second < four.tokens_per_second < 4 * one.tokens_per_second
    assert four.memory - one.memory == 3 * (3 * 64_000 + 2 * 4 * 1000)


def test_users_whose_prompts_fit_into_one_pass_decode_together():
    goal, prompts = Goal(users=4), PromptFacts(21, 50, (21,))
    found = forecast(Setup("m", drafter="plain"), ENGINE, NO_DRAFTS, prompts, goal)
    seconds = 4 * 20 * 1e-3 + 50 * (ENGINE.at(4) + 4 * 46e-5)
    assert found.tokens_per_second == pytest.approx(4 * 50 / seconds)


def test_drafts_that_pay_for_one_user_need_not_pay_for_many():
    alone, shared = (said(Setup("m"), DRAFTS, Goal(users=n)) for n in (1, 32))
    assert (alone.nodes, shared.nodes) == (16, 0)


def test_trees_of_drafters_that_propose_little_are_small():
    few = DraftFacts(DRAFTS.gained, 0.001, 0.0005, sizes=tuple(n / 4 for n in range(17)))
    found = said(Setup("m", budget=16), few)
    assert found.tokens_per_second == pytest.approx(2 / (ENGINE.at(5) + 125e-5 + 0.0015))


def test_passes_of_answers_may_take_longer_than_the_curve():
    plain = DraftFacts((1.0,), 0.0, 0.0, forward=2 * (0.01 + 125e-5))
    drafts = DraftFacts((1.0, 2.0), 0.0, 0.0, forward=3 * (ENGINE.at(2) + 125e-5))
    slowdown = Slowdown.of(ENGINE, plain, drafts, PROMPTS)
    assert slowdown.at([0, 0.5, 1, 9]) == pytest.approx([2, 2.5, 3, 3])
    slow = said(Setup("m", drafter="plain"), slowdown=slowdown)
    assert slow.tokens_per_second == pytest.approx(1 / (0.02 + 250e-5))


def test_passes_of_several_users_are_those_of_the_curve_with_what_each_adds():
    prompts = PromptFacts(1, 50)  # all users begin with the first pass
    slowdown = Slowdown(plain=0.5, full=3.0, nodes=7)
    engine = replace(ENGINE, batch_overhead=1e-3)
    plain, goal = Setup("m", drafter="plain"), Goal(users=8)
    said = forecast(plain, engine, NO_DRAFTS, prompts, goal, slowdown)
    seconds = ENGINE.at(8) + 8 * prompts.cached * ENGINE.slope + 8e-3
    assert said.tokens_per_second == pytest.approx(8 / seconds, rel=0.03)


def test_curves_go_on_beyond_their_end():
    assert ENGINE.at(34) == pytest.approx(0.04)
    assert ENGINE.at(9) == pytest.approx(0.015)


def test_fewer_weights_in_memory_take_as_long_as_reading_them():
    streamed = replace(ENGINE, streamed=10**7)  # a plain pass of 10 ms reads 10 MB
    less = streamed.with_weights(10**8 - 5 * 10**6)
    assert (less.weight_bytes, less.streamed) == (95 * 10**6, 15 * 10**6)
    assert less.seconds == pytest.approx((0.015, 0.025))
    assert streamed.with_weights(10**9).at(1) > 0


def test_a_plain_pass_now_tells_how_slow_everything_is():
    slow = replace(ENGINE, reference=0.5).with_pass(0.02)
    assert (slow.at(17), slow.prefill, slow.slope) == pytest.approx((0.04, 2e-3, 2e-5))
    assert ENGINE.with_pass(0.0) == ENGINE


def test_an_unmeasured_format_scales_with_its_bytes():
    half = ENGINE.scaled("int4", 5 * 10**7)
    assert half.predicted
    assert half.seconds == pytest.approx((0.005, 0.01))


@pytest.mark.parametrize("facts", [ENGINE, DRAFTS])
def test_facts_survive_json(facts):
    assert type(facts).parse(json.loads(json.dumps(facts.document()))) == facts


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (EngineFacts, {"seconds": []}),
        (EngineFacts, {"seconds": [0.0, 1.0]}),
        (EngineFacts, {"nodes": [2, 1]}),
        (EngineFacts, {"slope": -1}),
        (EngineFacts, {"prefill": float("nan")}),
        (EngineFacts, {"page_bytes": None}),
        (DraftFacts, {"gained": []}),
        (DraftFacts, {"gained": [0.5]}),
        (DraftFacts, {"gained": ["x"]}),
        (DraftFacts, {"seconds": float("nan")}),
        (DraftFacts, {"sizes": [0.0, 1.0]}),
        (DraftFacts, {"sizes": [-1.0] * 17}),
        (DraftFacts, {"likely_gained": [1.0]}),
        (EngineFacts, {"streamed": -1}),
        (EngineFacts, {"batch_overhead": -1}),
    ],
)
def test_damaged_facts_are_refused(kind, change):
    good = (ENGINE if kind is EngineFacts else DRAFTS).document()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        kind.parse({**good, **change})


def test_an_automatic_budget_keeps_the_nodes_that_pay_in_each_pass():
    # Half of the passes have four sure nodes, the others none that is right.
    facts = replace(DRAFTS, likely_gained=(3.0,), likely_sizes=(2.0,))
    found = said(Setup("m"), facts)
    assert found.tokens_per_second == pytest.approx(3 / (ENGINE.at(3) + 125e-5 + 0.0015))
    assert said(Setup("m", budget=found.nodes), facts) == said(Setup("m", budget=16), DRAFTS)


def test_likely_nodes_are_those_above_a_path_probability():
    tree = TokenTree(
        np.array([5, 6, 7, 8], np.int32),
        np.array([-1, 0, 0, 1], np.int32),
        np.array([1, 0.8, 0.1, 0.5], np.float32),
        np.array([-1, 0, 0, 0], np.int16),
    )
    passes, nodes = likely_passes([tree, tree], [[0, 1, 3], [0, 2]])
    by = {round(float(each), 2): number for number, each in enumerate(THRESHOLDS)}
    assert [passes[by[each]] for each in (0.9, 0.75, 0.4, 0.06)] == [5, 4, 3, 2]
    assert [nodes[by[each]] for each in (0.9, 0.75, 0.4, 0.06)] == [0, 2, 4, 6]


def test_smaller_trees_take_further_passes_for_what_they_miss():
    # root -> 1 (0.9) -> 3 (0.5); root -> 2 (0.6): in order of path probability 1, 2, 3.
    tree = TokenTree(
        np.array([5, 6, 7, 8], np.int32),
        np.array([-1, 0, 0, 1], np.int32),
        np.array([1, 0.9, 0.6, 0.5], np.float32),
        np.array([-1, 0, 0, 0], np.int16),
    )
    assert passes_needed([tree], [[0, 1, 3]], 4).tolist() == [3, 2, 2, 1, 1]
    assert passes_needed([tree], [[0, 2]], 4).tolist() == [2, 2, 1, 1, 1]
    assert passes_needed([tree, tree], [[0], [0, 1]], 1).tolist() == [3, 2]
    assert tree_sizes([tree, tree], 4).tolist() == [0, 2, 4, 6, 6]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.data())
def test_larger_trees_need_fewer_passes_and_the_recorded_one_a_single_one(scores, data):
    n = len(scores)
    parents = [-1] + [data.draw(st.integers(0, i - 1)) for i in range(1, n)]
    tree = TokenTree(
        np.arange(n, dtype=np.int32),
        np.array(parents, np.int32),
        np.array([1.0, *scores[1:]], np.float32),
        np.zeros(n, np.int16),
    )
    path = [data.draw(st.integers(0, n - 1))]
    while path[0]:
        path.insert(0, parents[path[0]])
    found = passes_needed([tree], [path], 12)
    assert found[0] == len(path)
    assert found[max(n - 1, 0)] == found[-1] == 1
    assert (np.diff(found) <= 0).all()
    passes, nodes = likely_passes([tree], [path])
    assert (np.diff(passes) <= 0).all()
    assert (nodes <= passes * (n - 1)).all()

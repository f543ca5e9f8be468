import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafters.draft_model.calibration import Calibration
from paceline.drafters.draft_model.stop_rules import Bandit, Confidence, stop_rule
from paceline.drafters.draft_model.tree_growth import GrowthLimits, grow, sample
from paceline.errors import MethodError
from tests.drafters.steps import asked, check_tree

VOCAB = 9
LIMITS = st.builds(
    GrowthLimits,
    st.integers(0, 30),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(-1, 5),
    st.just(lambda *_: True),
)


class Thinking:
    """Logits that are a function of the path to a node; counts its passes."""

    def __init__(self, seed):
        self.seed, self.passes = seed, []

    def after(self, path):
        return np.random.default_rng([self.seed, *path]).normal(0, 2, VOCAB).astype(np.float32)

    def __call__(self, tree, fresh):
        self.passes.append((len(tree), fresh))
        return np.stack([self.after(path(tree, node)) for node in range(len(tree))])[-fresh:]


def path(tree, node):
    return [*path(tree, tree.parents[node]), int(tree.tokens[node])] if node > 0 else []


def judge(logits, depths, k=5):
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-probs, 1)[:, :k].astype(np.int32)
    return order, np.take_along_axis(probs, order, 1)


@settings(deadline=None)
@given(LIMITS, st.integers(0, 99))
def test_trees_keep_to_their_limits_and_to_what_was_judged(limits, seed):
    run = Thinking(seed)
    growth = grow(3, limits, run, judge)
    check_tree(growth.tree, 3, limits.budget, VOCAB)
    assert len(run.passes) <= limits.passes
    assert all(fresh <= limits.width for _, fresh in run.passes)
    assert int(growth.tree.depths().max()) <= max(limits.levels + 1, 0)
    for node in range(1, len(growth.tree)):
        above = path(growth.tree, growth.tree.parents[node])
        tokens, probs = judge(run.after(above)[None], None)
        known = dict(zip(tokens[0].tolist(), probs[0].tolist(), strict=True))
        assert growth.tree.scores[node] == pytest.approx(known[int(growth.tree.tokens[node])])


def test_with_enough_passes_the_best_tree_is_found():
    run = Thinking(1)
    grown = grow(0, GrowthLimits(12, 64, 12, 12, lambda *_: True), run, judge).tree
    probs = {(): 1.0}
    best = {}
    while len(best) <= 12:
        top = max(probs, key=probs.get)
        best[top] = probs.pop(top)
        tokens, scores = judge(run.after(top)[None], None)
        for token, score in zip(tokens[0].tolist(), scores[0].tolist(), strict=True):
            probs[(*top, token)] = best[top] * score
    assert {tuple(path(grown, node)) for node in range(len(grown))} == set(best)


@settings(deadline=None)
@given(LIMITS, st.integers(0, 99))
def test_samples_have_a_shape_that_no_draw_decides(limits, seed):
    shapes = []
    for start in (seed, seed + 1):
        run, calibration = Thinking(start), Calibration(0.1, VOCAB)
        calibration.begin(asked([0], temperature=1.0))
        random = np.random.default_rng(start)
        growth = sample(
            3,
            limits,
            run,
            partial(calibration.draw, random=random),
            calibration.ranks(),
        )
        check_tree(growth.tree, 3, limits.budget, VOCAB)
        shapes.append(growth.tree.parents.tolist())
        for node, (drawn, row) in growth.rows.items():
            children = growth.tree.tokens[growth.tree.parents == node]
            assert children.tolist() == drawn.tolist()
            assert row.sum() == pytest.approx(1.0)
    assert shapes[0] == shapes[1]


def test_confidence_stops_below_its_threshold():
    run = Thinking(2)
    seen = []

    def more(passes, reach):
        seen.append(reach)
        return Confidence(0.4).more(passes, reach)

    grow(0, GrowthLimits(8, 2, 8, 8, more), run, judge)
    assert all(reach >= 0.4 for reach in seen[:-1])
    assert seen[-1] < 0.4


def test_the_bandit_goes_on_as_long_as_it_pays():
    def passes(bandit):
        counts = []
        for position in range(300):
            bandit.begin(0, position)
            counts.append(next(n for n in itertools.count(1) if not bandit.more(n, 0.0)))
        return np.mean(counts)

    eager, wary = Bandit(), Bandit()
    for _ in range(50):
        eager.learn(9, 8)
        wary.learn(9, 0)
    assert passes(eager) > 4 * passes(wary)
    twin = Bandit()
    twin.load(eager.state())
    assert passes(twin) == passes(eager)
    eager.reset()
    assert eager.state()["bandit"].tolist() == [2.0, 1.0]
    with pytest.raises(MethodError, match="bandit"):
        twin.load({"bandit": np.array([1.0, -1.0])})


def test_the_adaptive_threshold_follows_what_is_accepted():
    rule = stop_rule("adaptive", 0.9)  # which is not its own
    assert rule.more(1, 0.2)
    assert not rule.more(1, 0.19)
    rule.learn(8, 8)
    assert rule.state()["threshold"].tolist() == [0.1]
    rule.learn(8, 4)
    assert rule.state()["threshold"] == pytest.approx(0.1 * 2**0.5)
    twin = stop_rule("adaptive", 0.2)
    twin.load(rule.state())
    for _ in range(99):
        rule.learn(3, 0)
    assert not rule.more(1, 0.99)
    for _ in range(99):
        rule.learn(3, 3)
    assert rule.more(1, 0.001)
    rule.learn(0, 0)  # nothing was offered
    assert rule.more(1, 0.001)
    rule.reset()
    assert rule.state()["threshold"].tolist() == [0.2]
    assert twin.state()["threshold"] == pytest.approx(0.1 * 2**0.5)
    for wrong in ({"threshold": np.array([1.5])}, {"threshold": np.array([0.0])}, {}):
        with pytest.raises(MethodError, match="threshold"):
            twin.load(wrong)


def test_the_rule_called_depth_never_stops():
    assert stop_rule("depth", 0.2).more(5, 0.0)
    assert not stop_rule("confidence", 0.2).more(5, 0.1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sharpness_follows_what_comes_true(temperature):
    sharp, blunt = Calibration(0.1, VOCAB), Calibration(0.1, VOCAB)
    random = np.random.default_rng(0)
    for position in range(300):
        for calibration, right in ((sharp, True), (blunt, False)):
            calibration.begin(asked([0], temperature=temperature))
            logits = random.normal(0, 1, (1, VOCAB)).astype(np.float32)
            tokens, scores = calibration.judge(logits, np.array([position]), VOCAB)
            assert scores.sum() == pytest.approx(1.0, abs=1e-2)
            token = tokens[0, 0] if right else random.integers(0, VOCAB)
            calibration.learn(int(token), tokens[0], scores[0])
    kind = int(temperature > 0)
    assert sharp.state()["sharpness"][kind] > 3.0
    assert blunt.state()["sharpness"][kind] < 0.6
    assert sharp.state()["sharpness"][1 - kind] == (2.0, 1.4)[1 - kind]

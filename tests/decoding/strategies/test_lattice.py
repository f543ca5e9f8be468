import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from paceline.core import Request
from paceline.decoding.strategies.base import Task
from paceline.decoding.strategies.hypotheses.search import Search
from paceline.decoding.strategies.lattice import Lattice, LatticeSearch
from paceline.errors import MethodError
from tests.decoding.strategies.conftest import log_probs
from tests.decoding.strategies.test_beam import Counting
from tests.toy import ToyEngine


def lattice_of(settings, engine, request):
    task = Task(engine, request)
    lattice = Lattice(settings, task)
    with Search(task) as run:
        lattice.search(run)
    return lattice, run


@hypothesis(deadline=None, max_examples=30)
@given(st.integers(0, 10), st.integers(1, 5), st.integers(1, 3), st.integers(1, 60))
def test_every_path_is_made_of_steps_with_the_chances_of_their_place(first, width, suffix, nodes):
    engine = ToyEngine(vocab_size=5)
    settings = LatticeSearch(nodes=nodes, width=width, suffix=suffix, least=0, returned=9)
    request = Request((first % 5, 1), 6, stop_tokens=frozenset({4}))
    lattice, _ = lattice_of(settings, engine, request)
    assert engine.opened == 0
    for node in lattice.nodes[1:]:
        before, prob = node.into[0]
        assert before.tokens == node.tokens[:-1]
        row = log_probs(engine, [*request.prompt, *before.tokens])
        assert prob == pytest.approx(row[node.tokens[-1]])
        for parent, _ in node.into:  # steps go down: there are no circles
            assert len(parent.tokens) < len(node.tokens)
            shared = (*parent.tokens, node.tokens[-1])[-suffix:]
            assert node.tokens[-len(shared) :] == shared
    assert lattice.merged == sum(len(node.into) - 1 for node in lattice.nodes[1:])
    ways = lattice.best(10**6)
    assert len({tuple(tokens) for tokens, _, _ in ways}) == len(ways) <= lattice.count()


def test_without_merging_and_with_passes_enough_it_is_exhaustive():
    """Against all 3 ** 4 texts of a toy model."""
    engine = ToyEngine(vocab_size=3)
    settings = LatticeSearch(nodes=1000, suffix=64, top=3, least=0, width=3, returned=200)
    lattice, _ = lattice_of(settings, engine, Request((1, 2), 4))
    assert (lattice.merged, lattice.count()) == (0, 81)
    ways = lattice.best(200)
    assert len(ways) == 81
    for tokens, score, ended in ways:
        rows = [log_probs(engine, [1, 2, *tokens[:i]])[token] for i, token in enumerate(tokens)]
        assert (score, ended) == (pytest.approx(np.mean(rows)), False)


def test_merging_makes_many_texts_of_few_passes(engine, prompts):
    request = Request(prompts[0], 30, stop_tokens=frozenset({13}))
    settings = LatticeSearch(nodes=1000, suffix=2)
    merged, _ = lattice_of(settings, engine, request)
    apart, _ = lattice_of(LatticeSearch(nodes=1000, suffix=64), engine, request)
    assert merged.merged > 10
    assert apart.merged == 0
    assert merged.count() > 10 * apart.count() > 0
    assert sum(not node.end for node in merged.nodes) <= 1000 + settings.width


def test_the_strategy_gives_the_best_paths_and_bounds_its_caches(engine, prompts):
    request = Request(prompts[0], 20)
    settings = LatticeSearch(nodes=200)
    found = settings.run(Task(engine, request))
    expected = lattice_of(settings, engine, request)[0].best(4)
    assert [output.tokens for output in found] == [tokens for tokens, _, _ in expected]
    counting = Counting()
    LatticeSearch(width=3, nodes=50).run(Task(counting, Request((1, 2), 20)))
    assert (counting.most, counting.opened) == (3, 0)


@pytest.mark.parametrize("at", [1, 2, 5, 40])
def test_an_interrupted_search_gives_what_there_is(at):
    engine = Counting(interrupt=at)
    found = LatticeSearch(nodes=400).run(Task(engine, Request((1, 2), 20)))
    assert engine.opened == 0
    assert len(found) >= 1
    assert found[0].finish == ("length" if at == 40 else "interrupted")


def test_bad_settings_are_refused():
    for settings in ({"nodes": 0}, {"top": 0}, {"least": 2}, {"suffix": 0}, {"returned": 0}):
        with pytest.raises(MethodError, match="lattice"):
            LatticeSearch(**settings)

import numpy as np

from paceline.core import TokenTree
from paceline.engines.cost import SIZES, _binary, context_for, measure_cost
from tests.toy import ToyEngine


class Counting(ToyEngine):
    """Remembers the size of each pass and where it stood."""

    def __init__(self, **options):
        super().__init__(**options)
        self.passes = []

    def forward(self, batch, rows="all"):
        (sequence, tree), *_ = batch
        if rows == "all":
            self.passes.append((sequence.length, len(tree)))
        return super().forward(batch, rows)


def test_every_size_is_measured_in_turn_at_the_stated_context():
    engine = Counting(context=64)
    cost = measure_cost(engine, repeats=5)
    assert cost.nodes == SIZES == (1, 2, 4, 8, 16, 32, 64)
    assert all(seconds > 0 for seconds in cost.seconds)
    assert engine.passes == [(32, n) for n in SIZES] * 6
    assert engine.opened == 0
    assert context_for(engine) == 32


def test_the_tree_is_valid_for_the_smallest_vocabulary_and_shallow():
    for n in (1, 2, 7, 64):
        tree = _binary(n, 2)
        assert isinstance(tree, TokenTree)
        assert len(tree) == n
        assert tree.depths().max() == int(np.log2(n))

"""The profile accounts for every matrix that a pass reads, and changes nothing."""

from __future__ import annotations

import numpy as np

import tiny
from paceline.core import TokenTree
from tests.engines.test_native import native, tiny_model

__all__ = ["tiny_model"]  # the fixture

MATRICES = ("qkv", "output", "up", "down", "head")


def test_every_matrix_is_accounted_for(tiny_model) -> None:
    engine = native(tiny_model("gemma2"), threads=2, format="int8")
    sequence, tree = engine.start(tiny.tokens(40)), TokenTree.chain([3, 4, 5])
    plain = engine.forward([(sequence, tree)]).copy()
    assert sum(spent.seconds for spent in engine.profile().values()) == 0
    engine.profiling = True
    for _ in range(2):
        np.testing.assert_array_equal(engine.forward([(sequence, tree)]), plain)
    engine.profiling = False
    engine.forward([(sequence, tree)])
    parts = engine.profile()
    assert sum(parts[name].bytes for name in MATRICES) == 2 * engine.weight_bytes
    assert sum(parts[name].macs for name in MATRICES) == 2 * 3 * engine.parameters
    assert parts["attention"].bytes == 2 * 43 * engine.position_bytes
    for name, spent in parts.items():
        assert spent.seconds > 0, name
        assert spent.busy > 0, name
    engine.profiling = True
    assert sum(spent.macs for spent in engine.profile().values()) == 0

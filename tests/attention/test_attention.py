"""Attention patterns: what they read, that drafting changes nothing, and refusals."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.attention.base import BLOCK, BlockPattern
from paceline.attention.lm_infinite import LmInfinite
from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.registry import patterns
from tests.conftest import shared


@dataclass(frozen=True)
class BestBlocks(BlockPattern):
    """Reads the blocks whose mean key has the largest product with the query."""

    count: int = 1
    name = "best_blocks"

    def blocks(self, layer, queries, keys, old):
        scores = queries.float() @ keys.repeat_interleave(len(queries) // len(keys), 0).mT
        scores = scores.masked_fill(~old, -torch.inf)
        best = scores.topk(min(self.count, scores.shape[-1]), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


ALL = [
    LmInfinite(sinks=2, window=5),
    LmInfinite(sinks=0, window=20),
    BestBlocks(sinks=4, local=2, count=1),
]
MODEL = "stories260K"


@pytest.fixture(scope="module")
def model():
    return load(shared("models", MODEL))


@pytest.fixture(scope="module")
def ids(model):
    text = "Once upon a time there was a little dog named Max. He liked to run in the park. " * 30
    return np.array(model.tokenizer.encode(text)[:400], np.int32)


def engine(model, pattern):
    return open_engine(model, "reference", pattern=pattern)


def run(opened, ids, chunk):
    rows = []
    opened.release(opened.start(ids, lambda _, __, logits: rows.append(logits.copy()), chunk))
    return np.concatenate(rows)


def test_a_window_reads_sinks_and_recent_positions():
    seen = LmInfinite(sinks=1, window=2).visible(torch.tensor([4, 6]), torch.arange(7))
    assert seen.int().tolist() == [[1, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 1, 1]]


def test_a_wide_window_changes_no_bit(model, ids):
    plain = run(engine(model, None), ids, 256)
    assert (run(engine(model, LmInfinite(window=1000)), ids, 256) == plain).all()
    assert (run(engine(model, BestBlocks(count=99)), ids, 256) == plain).all()


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_chunks_change_nothing(model, ids, pattern):
    whole = run(engine(model, pattern), ids, 400)
    assert np.abs(whole - run(engine(model, None), ids, 400)).max() > 0.1
    for chunk in (1, 37, 256):
        part = run(engine(model, pattern), ids, chunk)
        np.testing.assert_allclose(part, whole, atol=1e-3, rtol=0)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), pattern=st.sampled_from(ALL), length=st.sampled_from([3, 64, 130, 258, 330]))
def test_a_tree_equals_its_branches(model, ids, data, pattern, length):
    opened = engine(model, pattern)
    n = data.draw(st.integers(2, 9))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, n)]
    tokens = np.arange(5, 5 + n, dtype=np.int32)  # no two alike: siblings differ
    origin = np.zeros(n, np.int16)
    origin[0] = -1
    tree = TokenTree(tokens, np.array(parents, np.int32), np.ones(n, np.float32), origin)
    sequence = opened.start(ids[:length])
    logits = opened.forward([(sequence, tree)]).copy()
    for node in range(n):
        path, at = [], node
        while at >= 0:
            path.insert(0, int(tokens[at]))
            at = parents[at]
        alone = opened.forward([(sequence, TokenTree.chain(path))])
        np.testing.assert_allclose(alone[-1], logits[node], atol=1e-3, rtol=0)


@pytest.mark.parametrize("spec", ["lm_infinite:sinks=2,window=16", ALL[2]])
@pytest.mark.parametrize("drafter", ["recycle", "hostile", "blend"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafting_gives_what_plain_decoding_gives(spec, drafter, temperature):
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 4}
    folder = shared("models", MODEL)
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 8
    outputs = [
        LM(folder, engine="reference", drafter=d, budget=12, attention=spec)
        .generate(prompt, **options)
        .tokens
        for d in (drafter, "plain")
    ]
    assert outputs[0] == outputs[1]


def test_deep_trees_stay_within_the_local_blocks(model, ids):
    opened = engine(model, BestBlocks(local=2))
    sequence = opened.start(ids[:130])
    depth = 2 * BLOCK
    parents = np.r_[-1, 0, np.arange(depth)].astype(np.int32)  # a chain, and a second first node
    tokens = np.r_[7, 9, np.full(depth, 8)].astype(np.int32)
    origin = np.zeros(depth + 2, np.int16)
    origin[0] = -1
    parents[2] = 0
    parents[3:] = np.arange(2, depth + 1)
    tree = TokenTree(tokens, parents, np.ones(depth + 2, np.float32), origin)
    with pytest.raises(RequestError, match="local blocks of 64 positions; take a smaller budget"):
        opened.forward([(sequence, tree)])


def test_other_engines_and_unknown_names_are_refused(model):
    with pytest.raises(
        MethodError,
        match="the native engine and the attention pattern lm_infinite do not go together",
    ):
        open_engine(model, "native", pattern=LmInfinite())
    with pytest.raises(MethodError, match="unknown attention pattern 'lm_infinit'"):
        LM(shared("models", MODEL), engine="reference", attention="lm_infinit")
    with pytest.raises(MethodError, match="lm_infinite:window is 0"):
        patterns.parse("lm_infinite:window=0")


def test_a_pattern_takes_no_part_in_eviction(model):
    from paceline.abilities import Ability

    found = engine(model, LmInfinite()).abilities
    assert Ability.EVICT not in found
    assert Ability.ATTENTION_MASS not in found

"""HyperAttention: what it reads, by definition; chunks and trees change nothing; its estimate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline import LM
from paceline.attention.hyper_attention import HyperAttention
from paceline.core import TokenTree
from paceline.errors import CombinationError, MethodError, RequestError
from paceline.registry import patterns
from tests.attention.conftest import run
from tests.conftest import shared

SPEC = "hyper_attention:block=16,sample=8,local=64,bits=4"


@pytest.fixture(scope="module")
def ids(story):
    return story(400)


def read_by(pattern, queries, keys, at):
    """Return the bias of one query head over its keys, by the definition, in numpy: [S]."""
    directions = np.random.default_rng(2310).standard_normal((keys.shape[1], pattern.bits))
    buckets = [index ^ index >> 1 for index in range(1 << pattern.bits)]  # Gray codes, in order

    def place(vector):
        bits = vector @ directions.astype(np.float32) > 0
        return buckets.index(sum(1 << i for i, bit in enumerate(reversed(bits)) if bit))

    bias = np.zeros(len(keys))
    far, first = max(0, at + 1 - pattern.local) // pattern.local * pattern.local, 0
    own = place(queries[at])
    while first < far:
        size = pattern.local
        while first + 2 * size <= far:
            size *= 2
        if size > pattern.block + pattern.sample:
            hashes = [place(keys[row]) for row in range(first, first + size)]
            order = sorted(range(size), key=hashes.__getitem__)
            below, upto = sum(h < own for h in hashes), sum(h <= own for h in hashes)
            begin = min(max(0, (below + upto) // 2 - pattern.block // 2), size - pattern.block)
            bias[first : first + size] = -np.inf
            if pattern.sample:
                drawn = np.random.default_rng((2310, first, size)).permutation(size)
                bias[first + drawn[: pattern.sample]] = np.log(size / pattern.sample)
            bias[[first + row for row in order[begin : begin + pattern.block]]] = 0
        first += size
    return bias


@given(
    seed=st.integers(0, 1 << 20),
    size=st.integers(1, 400),
    block=st.integers(1, 40),
    sample=st.integers(0, 30),
    bits=st.integers(1, 7),
)
def test_it_reads_what_the_definition_says(seed, size, block, sample, bits):
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(2, 1, size, 8)).astype(np.float32)
    pattern = HyperAttention(block=block, sample=sample, local=64, bits=bits)
    at = torch.arange(size)
    found = pattern.mask(0, torch.from_numpy(queries), torch.from_numpy(keys), at, at, True)
    for query in {0, size // 2, size - 1}:
        wanted = read_by(pattern, queries[0], keys[0], query)
        np.testing.assert_allclose(found[0, query], wanted, atol=1e-6)


def test_samples_estimate_what_hashes_leave_out():
    rng = np.random.default_rng(3)
    size, pattern = 1024, HyperAttention(block=32, sample=256, local=64, bits=5)
    queries, keys = (0.4 * rng.normal(size=(2, 8, size, 16))).astype(np.float32)
    scores = torch.from_numpy(queries[:, -1:]) @ torch.from_numpy(keys).mT  # [H, 1, S]
    at = torch.arange(size)
    bias = pattern.mask(0, torch.from_numpy(queries), torch.from_numpy(keys), at, at, True)[:, -1:]
    full = scores.logsumexp(-1)
    found = (scores + bias).logsumexp(-1)
    without = (scores + bias.masked_fill(bias > 0, -torch.inf)).logsumexp(-1)
    assert (found - full).abs().mean() < 0.1
    assert (without - full).mean() < -0.3


def test_reading_all_changes_no_bit(opened, ids):
    plain = run(opened(None, "reference"), ids, 400)
    for spec in ("block=400,sample=0,local=64", "local=1024"):
        found = run(opened(f"hyper_attention:{spec}", "reference"), ids, 400)
        np.testing.assert_array_equal(found, plain)


def test_chunks_change_nothing(opened, ids):
    engine = opened(SPEC, "reference")
    whole = run(engine, ids, 400)
    assert np.abs(whole - run(opened(None, "reference"), ids, 400)).max() > 0.1
    for chunk in (37, 256):
        gaps = np.abs(run(engine, ids, chunk) - whole).max(1)
        assert np.median(gaps) < 1e-4
        assert (gaps > 1e-3).mean() < 0.05  # products on the edge of a bucket: rare


def test_a_tree_reads_what_its_paths_read(opened, ids):
    engine = opened(SPEC, "reference")
    parents = np.array([-1, 0, 0, 1, 2, 4], np.int32)
    tokens = np.arange(5, 11, dtype=np.int32)
    origin = np.array([-1, 0, 0, 0, 0, 0], np.int16)
    tree = TokenTree(tokens, parents, np.ones(6, np.float32), origin)
    sequence = engine.start(ids[:316])  # nodes on both sides of an edge, 320
    logits = engine.forward([(sequence, tree)]).copy()
    chain = np.concatenate([ids[:316], tokens[[0, 2, 4, 5]]])
    np.testing.assert_allclose(run(engine, chain, 400)[-1], logits[-1], atol=1e-4, rtol=0)


def test_drafting_gives_what_plain_decoding_gives():
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 6
    options = {"engine": "reference", "attention": SPEC, "budget": 8}
    outputs = [
        LM(shared("models", "stories260K"), drafter=drafter, **options)
        .generate(prompt, max_new_tokens=30, temperature=0.8, seed=2)
        .tokens
        for drafter in ("recycle", "plain")
    ]
    assert outputs[0] == outputs[1]


def test_what_cannot_be_is_refused(opened, model):
    for spec, message in (
        ("local=65", "hyper_attention:local is 65, expected a multiple of 64"),
        ("block=0", "hyper_attention:block is 0"),
        ("bits=17", "hyper_attention:bits is 17"),
    ):
        with pytest.raises(MethodError, match=message):
            patterns.parse(f"hyper_attention:{spec}")
    with pytest.raises(CombinationError, match="hyper_attention"):
        opened(SPEC, "native")
    engine = opened(SPEC, "reference")
    tree = TokenTree.chain(list(range(5, 135)))
    parents = tree.parents.copy()
    parents[-1] = 0  # no chain
    deep = TokenTree(tree.tokens, parents, tree.scores, tree.origin)
    with pytest.raises(RequestError, match="within its 64 local positions"):
        engine.forward([(engine.start([5] * 10), deep)])

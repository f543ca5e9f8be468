"""MInference and HiP: what blocks of a prompt choose, in both engines, however it is run."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline import LM
from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.choose_positions import choose_positions, search_tree
from paceline.engines.head_profile import (
    candidates,
    find_profile,
    read_profile,
    write_profile,
)
from paceline.engines.sparse_prefill import BLOCK, HeadRule, PrefillRule, SparsePrefill
from paceline.errors import MethodError, ModelError, RequestError
from paceline.registry import patterns
from tests.attention.conftest import run
from tests.conftest import shared

SPECS = [
    "minference:budget=96,samples=2,local=1",
    "minference:budget=64,vertical=0,local=2,sinks=0",
    "hip:keys=64,local=1,samples=3",
    "hip:keys=80,local=2,dense=1",
]


@pytest.fixture(scope="module")
def ids(story):
    return story(480)


@pytest.fixture(scope="module")
def mixed(model, tmp_path_factory):
    """Return a pattern whose heads choose by all rules in turn."""
    rules = [
        HeadRule(PrefillRule.A_SHAPE, 90),
        HeadRule(PrefillRule.MEAN_BLOCKS, 1),
        HeadRule(PrefillRule.VERTICAL_SLASH, 70, 30),
        HeadRule(PrefillRule.TREE, 5),
    ]
    path = tmp_path_factory.mktemp("profiles") / "heads.json"
    count = iter(range(1 << 20))
    write_profile(
        path,
        tuple(
            tuple(rules[next(count) % len(rules)] for _ in range(layer.heads))
            for layer in model.config.layers
        ),
    )
    return f"minference:local=1,profile={path}"


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("spec", ["minference:budget=512,local=1", "hip:keys=512,local=1"])
def test_choosing_all_changes_no_bit(opened, ids, spec, kv_format):
    plain = run(opened(None, kv_format=kv_format), ids, 64, 0)
    np.testing.assert_array_equal(run(opened(spec, kv_format=kv_format), ids, 130, 450), plain)


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("spec", [*SPECS, "mixed"])
def test_chunks_and_threads_change_no_bit(opened, mixed, ids, spec, kv_format):
    engine = opened(mixed if spec == "mixed" else spec, kv_format=kv_format)
    whole = run(engine, ids, 480, 450)
    assert np.abs(whole - run(opened(None, kv_format=kv_format), ids, 480, 450)).max() > 0.01
    for chunk in (1, 100, 256):
        np.testing.assert_array_equal(run(engine, ids, chunk, 450), whole)
    engine.threads = 3
    np.testing.assert_array_equal(run(engine, ids, 100, 450), whole)
    engine.threads = 1


@pytest.mark.parametrize("spec", [*SPECS, "mixed"])
def test_native_reads_what_the_reference_reads(opened, mixed, ids, spec):
    spec = mixed if spec == "mixed" else spec
    native = run(opened(spec), ids, 128, 450)
    reference = run(opened(spec, "reference"), ids, 200, 450)
    gaps = np.abs(native - reference).max(1)
    # Positions of equal worth within rounding may be chosen otherwise: rare.
    assert np.median(gaps) < 1e-4
    assert (gaps > 1e-3).mean() < 0.05


def test_a_batch_changes_no_bit(opened, mixed, ids):
    engine = opened(mixed)
    parts = [(0, 128), (128, 320), (384, 450)]
    batch = []
    for begin, end in parts:
        sequence = engine.open()
        engine.set_prompt(sequence, 450)
        engine.extend(sequence, ids[:begin])
        batch.append((sequence, TokenTree.chain(ids[begin:end])))
    alone = [engine.forward([each]).copy() for each in batch]
    np.testing.assert_array_equal(engine.forward(batch), np.concatenate(alone))


@pytest.mark.parametrize("spec", SPECS[::2])
def test_drafting_gives_what_plain_decoding_gives(spec):
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 8
    outputs = [
        LM(shared("models", "stories260K"), engine="native", drafter=d, budget=12, attention=spec)
        .generate(prompt, max_new_tokens=40, temperature=0.7, seed=4)
        .tokens
        for d in ("recycle", "plain")
    ]
    assert outputs[0] == outputs[1]


def attention_of(queries, keys):
    """Softmax of 64 queries over the keys up to each, in numpy."""
    before = len(keys) - BLOCK
    scores = queries.astype(np.float64) @ keys.T.astype(np.float64)
    scores[np.arange(len(keys))[None] > before + np.arange(BLOCK)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def filled(read):
    """Read the last unread positions until there are whole blocks of them."""
    for position in range(len(read) - 1, -1, -1):
        if read.sum() % BLOCK == 0:
            break
        read[position] = True
    return read


def expected_lines(weights, rule, head):
    """Choose lines as the paper does, distance by distance and column by column."""
    before = weights.shape[1] - BLOCK
    begin, end = rule.sinks * BLOCK, before - (rule.local - 1) * BLOCK
    nodes = [BLOCK * (i + 1) // rule.samples - 1 for i in range(rule.samples)]
    by_distance = {
        distance: sum(
            weights[node, before + node - distance] for node in nodes if before + node >= distance
        )
        for distance in range(before + BLOCK)
    }
    read = np.ones(before, bool)
    read[begin:end] = False
    for distance in sorted(by_distance, key=by_distance.get, reverse=True):
        if read[begin:end].sum() >= head.second:
            break
        reached = [before + query - distance for query in range(BLOCK)]
        read[[position for position in reached if begin <= position < end]] = True
    columns = weights[nodes].sum(0)
    unread = [position for position in range(begin, end) if not read[position]]
    read[sorted(unread, key=lambda position: -columns[position])[: head.first]] = True
    return filled(read)


@given(
    seed=st.integers(0, 1 << 20),
    blocks=st.integers(3, 7),
    sinks=st.integers(0, 1),
    columns=st.integers(0, 150),
    positions=st.integers(0, 200),
    samples=st.sampled_from([1, 3, 4]),
)
def test_lines_are_those_of_the_definition(seed, blocks, sinks, columns, positions, samples):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(BLOCK, 8)).astype(np.float32)
    keys = rng.normal(size=((blocks + 1) * BLOCK, 8)).astype(np.float32)
    rule = SparsePrefill(samples, 1, sinks, 2)
    head = HeadRule(PrefillRule.VERTICAL_SLASH, columns, positions)
    found = choose_positions(rule, head, torch.from_numpy(queries), torch.from_numpy(keys), None)
    expected = expected_lines(attention_of(queries, keys), rule, head)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.sum() % BLOCK == 0


@given(seed=st.integers(0, 1 << 20), blocks=st.integers(3, 8), count=st.integers(1, 9))
def test_blocks_are_those_of_the_largest_mean_scores(seed, blocks, count):
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(BLOCK, 8)).astype(np.float32)
    keys = rng.normal(size=((blocks + 1) * BLOCK, 8)).astype(np.float32)
    rule, head = SparsePrefill(4, 1, 1, 2), HeadRule(PrefillRule.MEAN_BLOCKS, count)
    found = choose_positions(rule, head, torch.from_numpy(queries), torch.from_numpy(keys), None)
    means = keys[: blocks * BLOCK].reshape(blocks, BLOCK, 8).mean(1)
    scores = (means @ queries.mean(0))[1 : blocks - 1]
    best = set(1 + np.argsort(-scores, kind="stable")[:count])
    chosen = best | {0, blocks - 1}
    np.testing.assert_array_equal(
        found.numpy(), np.repeat([block in chosen for block in range(blocks)], BLOCK)
    )


def halved(scores, count):
    """Search a tree as HiP does, by recursion over whole levels, in numpy."""
    level = [np.arange(len(scores))[i * len(scores) // count : (i + 1) * len(scores) // count]
             for i in range(count)]  # fmt: skip
    while max(map(len, level)) > 1:
        parts = [part for leaves in level for part in np.array_split(leaves, 2) if len(part)]
        worth = np.array([scores[part[len(part) // 2]] for part in parts])
        keep = np.sort(np.argsort(-worth, kind="stable")[:count])
        level = [parts[place] for place in keep]
    return [int(part[0]) for part in level]


@given(seed=st.integers(0, 1 << 20), leaves=st.integers(1, 90), count=st.integers(1, 40))
def test_a_tree_is_searched_level_by_level(seed, leaves, count):
    scores = np.random.default_rng(seed).normal(size=leaves)
    found = search_tree(torch.from_numpy(scores), count).tolist()
    assert len(found) == len(set(found)) == min(count, leaves)
    if count < leaves:
        assert found == halved(scores, count)
    if leaves <= 2 * count:  # all leaves are compared
        assert set(found) == set(np.argsort(-scores)[:count].tolist())


def test_a_tree_costs_the_logarithm():
    class Counted:
        def __init__(self, scores):
            self.scores, self.device, self.asked = scores, scores.device, 0

        def __len__(self):
            return len(self.scores)

        def __getitem__(self, places):
            self.asked += len(places)
            return self.scores[places]

    asked = []
    for leaves in (1 << 10, 1 << 14):
        scores = Counted(torch.randn(leaves, generator=torch.Generator().manual_seed(1)))
        search_tree(scores, 8)
        asked.append(scores.asked)
    assert asked == [7 * 16, 11 * 16]


def test_a_profile_takes_the_rule_that_is_nearest(opened, ids):
    engine, rule = opened(None), SparsePrefill(4, 1, 1, 1)
    everything = HeadRule(PrefillRule.A_SHAPE, 4096)
    rules = [HeadRule(PrefillRule.A_SHAPE, 0), everything, HeadRule(PrefillRule.MEAN_BLOCKS, 1)]
    profile = find_profile(engine, ids, rule, rules)
    assert {head for layer in profile for head in layer} == {everything}
    ticks = []
    profile = find_profile(engine, ids, rule, candidates(64), ticks.append)
    assert [len(layer) for layer in profile] == [x.heads for x in engine.config.layers]
    assert len(ticks) == len(engine.config.layers)
    assert len({head for layer in profile for head in layer} & set(candidates(64))) > 1
    reference = find_profile(opened(None, "reference"), ids, rule, candidates(64))
    pairs = [
        one == other
        for layer, others in zip(profile, reference, strict=True)
        for one, other in zip(layer, others, strict=True)
    ]
    assert np.mean(pairs) > 0.8  # but for rounding
    assert engine.memory.used == 0


def test_texts_that_tell_nothing_are_refused(opened, ids):
    engine = opened(None)
    with pytest.raises(RequestError, match="the text has 480 tokens; a profile needs 512 to 512"):
        find_profile(engine, ids, SparsePrefill(4, 1, 2, 5), candidates(64))
    with pytest.raises(RequestError, match="a model that sees 576 tokens, found 512"):
        find_profile(engine, ids, SparsePrefill(4, 1, 2, 6), candidates(64))


def test_a_profile_is_read_as_it_was_written(tmp_path):
    profile = ((HeadRule(PrefillRule.TREE, 3), HeadRule(PrefillRule.VERTICAL_SLASH, 1, 2)), ())
    write_profile(tmp_path / "heads.json", profile)
    assert read_profile(str(tmp_path / "heads.json"), "minference") == profile


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", "\x00",
        '{"format": "paceline head profile 2", "layers": []}',
        '{"format": "paceline head profile 1"}',
        '{"format": "paceline head profile 1", "layers": 3}',
        '{"format": "paceline head profile 1", "layers": [[["mass", 1, 2]]]}',
        '{"format": "paceline head profile 1", "layers": [[["tree", -1, 2]]]}',
        '{"format": "paceline head profile 1", "layers": [[["tree", 1.5, 2]]]}',
        '{"format": "paceline head profile 1", "layers": [[["tree", 1]]]}',
        '{"format": "paceline head profile 1", "layers": [[["tree", 99999999999, 1]]]}',
    ],
)  # fmt: skip
def test_files_that_are_no_profile_are_refused(tmp_path, text):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(MethodError, match=r"minference:profile .* is no head profile; make one"):
        patterns.parse(f"minference:profile={path}")


def test_a_missing_profile_is_refused(tmp_path):
    with pytest.raises(MethodError, match=r"minference:profile .* cannot be read: No such file"):
        patterns.parse(f"minference:profile={tmp_path / 'none.json'}")


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_profile_of_another_model_is_refused(model, tmp_path, name):
    path = tmp_path / "heads.json"
    write_profile(path, ((HeadRule(PrefillRule.TREE, 3),),))
    with pytest.raises(ModelError, match="the head profile is of 1 layers with 1 query heads"):
        open_engine(model, name, pattern=patterns.parse(f"minference:profile={path}"))


def test_bad_settings_are_refused():
    for spec, message in (
        ("minference:budget=63", "minference:budget is 63"),
        ("minference:vertical=1.5", "minference:vertical is 1.5"),
        ("minference:samples=0", "minference:samples is 0"),
        ("hip:keys=8", "hip:keys is 8"),
        ("hip:local=0", "hip:local is 0"),
    ):
        with pytest.raises(MethodError, match=message):
            patterns.parse(spec)

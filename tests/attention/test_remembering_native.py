"""Patterns that remember queries or clusters, in the native engine: the same bits however run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.errors import MemoryFullError, RequestError
from paceline.registry import patterns
from tests.attention.conftest import run
from tests.attention.test_few_read import path_to, random_tree
from tests.conftest import shared

MODEL = "stories260K"
SPECS = [
    "infllm:share=0.2,least=0,local=64,following=32,representatives=2",
    "infllm:share=0.3,least=0,local=80,following=48,representatives=16,sinks=0",
    "squeezed:share=0.2,least=0,local=32,clusters=0.2",
    "squeezed:share=0.3,least=0,sinks=0,local=16,clusters=0.1",
    "squeezed:share=0.2,least=0,local=32,clusters=0.2,levels=2,dense=1",
]
PROMPT = 205  # not a whole run


@pytest.fixture(scope="module")
def ids(story):
    return story(300)


def prompts(spec):
    return (0, PROMPT) if spec.startswith("infllm") else (PROMPT,)


@pytest.mark.parametrize("spec", SPECS)
def test_native_reads_what_the_reference_reads(opened, ids, spec):
    for prompt in prompts(spec):
        native = run(opened(spec), ids, 100, prompt)
        reference = run(opened(spec, "reference"), ids, 100, prompt)
        gaps = np.abs(native - reference).max(1)
        # Positions of equal worth within rounding may be chosen otherwise: rare, of little weight.
        assert np.median(gaps[prompt:]) < 1e-4
        assert (gaps > 1e-3).mean() < 0.05
        plain = run(opened(None), ids, 100)
        assert np.abs(native - plain)[prompt:].max() > 0.1
        np.testing.assert_array_equal(native[:prompt], plain[:prompt])


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["infllm", "squeezed", "squeezed:levels=2"])
def test_choosing_everything_changes_no_bit(opened, ids, name, kv_format):
    plain = run(opened(None, kv_format=kv_format), ids, 64)
    spec = f"{name}{',' if ':' in name else ':'}share=1,least=0,sinks=0"
    for chunk in (1, 37, 300):
        found = run(opened(spec, kv_format=kv_format), ids, chunk, PROMPT)
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
def test_chunks_and_threads_change_no_bit(opened, ids, spec, kv_format):
    engine = opened(spec, kv_format=kv_format)
    for prompt in prompts(spec):
        whole = run(engine, ids, 300, prompt)
        for chunk in (1, 37, 208):
            np.testing.assert_array_equal(run(engine, ids, chunk, prompt), whole)
        engine.threads = 3
        np.testing.assert_array_equal(run(engine, ids, 100, prompt), whole)
        engine.threads = 1


@settings(max_examples=15, deadline=None)
@given(data=st.data(), spec=st.sampled_from(SPECS), length=st.sampled_from([20, 130, 208, 250]))
def test_a_tree_equals_its_branches(opened, ids, data, spec, length):
    engine, tree = opened(spec), random_tree(data)
    sequence = engine.start(ids[:length], prompt=True)
    logits = engine.forward([(sequence, tree)]).copy()
    for node in range(len(tree)):
        alone = engine.forward([(sequence, TokenTree.chain(path_to(tree, node)))])
        np.testing.assert_array_equal(alone[-1], logits[node])
    node = int(tree.depths().argmax())
    text = np.r_[ids[:length], path_to(tree, node)].astype(np.int32)
    path = []
    while node >= 0:
        path.insert(0, node)
        node = int(tree.parents[node])
    engine.forward([(sequence, tree)])
    engine.commit(sequence, path)
    again = engine.open()
    engine.set_prompt(again, length)
    engine.extend(again, text)
    root = TokenTree.chain([7, 9, 11])
    np.testing.assert_array_equal(
        engine.forward([(sequence, root)]).copy(), engine.forward([(again, root)])
    )
    engine.release(sequence)
    engine.release(again)


@pytest.mark.parametrize("spec", SPECS)
def test_forks_that_part_read_as_if_alone(opened, ids, spec):
    """Runs that two texts share have representatives of their own in each."""
    engine, root = opened(spec), TokenTree.root(7)
    first = engine.start(ids[:PROMPT], prompt=True)
    other = engine.fork(first)
    ends = (ids[PROMPT:290], ids[40:115])
    for sequence, text in zip((first, other), ends, strict=True):
        engine.extend(sequence, text, chunk=20)
    together = engine.forward([(first, root), (other, root)]).copy()
    for row, sequence, text in zip(together, (first, other), ends, strict=True):
        alone = engine.open()
        engine.set_prompt(alone, PROMPT)
        engine.extend(alone, np.r_[ids[:PROMPT], text].astype(np.int32))
        np.testing.assert_array_equal(engine.forward([(alone, root)])[0], row)
        for each in (sequence, alone):
            engine.release(each)


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_forks_changes_no_bit(opened, ids, spec):
    engine, chain = opened(spec), TokenTree.chain([5, 6])
    first = engine.start(ids[:PROMPT], prompt=True)
    forks = [first, engine.fork(first), engine.start(ids[:99], prompt=True)]
    together = engine.forward([(each, chain) for each in forks]).copy()
    forks.append(engine.fork(first))
    alone = np.concatenate([engine.forward([(each, chain)]).copy() for each in forks])
    np.testing.assert_array_equal(together, alone[:-2])
    np.testing.assert_array_equal(alone[-2:], alone[:2])
    for each in forks:
        engine.release(each)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cut", [150, 200, 207, 214, 230])
def test_what_is_cut_is_forgotten(opened, ids, spec, cut):
    engine, root = opened(spec), TokenTree.root(7)
    text = np.r_[ids[:cut], ids[20:120]].astype(np.int32)[:PROMPT]
    fresh = engine.start(text, prompt=True)
    engine.extend(fresh, ids[:60])
    wanted = engine.forward([(fresh, root)]).copy()
    other = engine.start(np.r_[ids[:cut], ids[:90]].astype(np.int32)[:PROMPT], prompt=True)
    engine.extend(other, ids[PROMPT : PROMPT + 45])
    point = engine.cut_point(other, min(cut, PROMPT))
    assert cut >= PROMPT or cut - 16 < point <= cut
    engine.truncate(other, point)
    engine.extend(other, np.r_[text, ids[:60]].astype(np.int32)[point:])
    np.testing.assert_array_equal(engine.forward([(other, root)]), wanted)
    for sequence in (fresh, other):
        engine.release(sequence)


def test_a_text_is_cut_at_runs_where_queries_are_summed(opened, ids):
    engine = opened(SPECS[0])
    sequence = engine.start(ids[:100])
    assert [engine.cut_point(sequence, length) for length in (98, 95, 16)] == [98, 80, 16]
    with pytest.raises(RequestError, match="in runs of 16, so that this text can be cut to 80"):
        engine.truncate(sequence, 95)
    engine.release(sequence)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("drafter", "temperature"), [("recycle", 0.0), ("layer_skip", 0.9)])
def test_drafting_gives_what_plain_decoding_gives(spec, drafter, temperature):
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 4}
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 8
    outputs = [
        LM(shared("models", MODEL), engine="native", drafter=d, budget=12, attention=spec)
        .generate(prompt, **options)
        .tokens
        for d in (drafter, "plain")
    ]
    assert outputs[0] == outputs[1]


def test_rows_by_cluster_take_pages_and_give_them_back(model, ids):
    engine = open_engine(model, "native", pattern=patterns.parse(SPECS[2]))
    sequence = engine.start(ids[:PROMPT], prompt=True)
    used = engine.memory.used
    engine.forward([(sequence, TokenTree.root(7))])
    assert engine.memory.used == used + 3 == used + engine.prompt_pages(PROMPT)
    fork = engine.fork(sequence)
    engine.forward([(sequence, TokenTree.root(8))])
    assert engine.memory.used == used + 3 + 1  # the last page, which is not full, was copied
    engine.truncate(fork, 150)
    engine.release(sequence)
    assert engine.memory.used == 3
    engine.release(fork)
    assert engine.memory.used == 0


def test_a_limit_leaves_no_half_clusters(model, ids):
    page = open_engine(model, "native", pattern=patterns.parse(SPECS[2])).memory.page_bytes
    engine = open_engine(model, "native", pattern=patterns.parse(SPECS[2]), kv_limit=6 * page)
    sequence = engine.start(ids[:PROMPT], prompt=True)
    with pytest.raises(MemoryFullError, match="3 more pages"):
        engine.forward([(sequence, TokenTree.root(7))])
    assert engine.memory.used == 4
    engine.release(sequence)


def branching(depth):
    parents = np.r_[-1, 0, 0, np.arange(2, depth)].astype(np.int32)
    tokens = np.r_[7, 9, np.full(depth - 1, 8)].astype(np.int32)
    origin = np.zeros(depth + 1, np.int16)
    origin[0] = -1
    return TokenTree(tokens, parents, np.ones(depth + 1, np.float32), origin)


def test_trees_leave_room_for_the_queries_that_choose(opened, ids):
    engine = opened("infllm:share=0.2,least=0,local=64,following=48")
    sequence = engine.start(ids[:150], prompt=True)
    with pytest.raises(RequestError, match=r"the last 16 positions.*take a smaller budget"):
        engine.forward([(sequence, branching(20))])
    engine.release(sequence)
    short = engine.start(ids[:20], prompt=True)
    assert engine.forward([(short, branching(20))]).shape[0] == 21
    engine.release(short)


def test_a_tree_that_begins_in_the_prompt_is_refused(opened, ids):
    engine = opened(SPECS[2])
    sequence = engine.start(ids[:60])
    engine.set_prompt(sequence, 70)
    with pytest.raises(RequestError, match=r"behind the prompt, whose 64.*found position 60"):
        engine.forward([(sequence, branching(20))])
    assert len(engine.forward([(sequence, TokenTree.chain(list(range(5, 25))))])) == 20
    engine.release(sequence)

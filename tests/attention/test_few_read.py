"""Patterns that choose runs of positions: both engines, the same bits however text is run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.attention.lserve import copying_heads
from paceline.core import Request, TokenTree
from paceline.engines import open_engine
from paceline.engines.few_read import HeadRead
from paceline.errors import MethodError, RequestError
from paceline.registry import patterns
from paceline.serving.messages import Job
from paceline.serving.worker import Worker
from tests.attention.conftest import run
from tests.conftest import shared

MODEL = "stories260K"
FEW = "least=0,sinks=16,local=32,share=0.2"
SPECS = [
    f"quest:{FEW}",
    f"quest:summary=mean,{FEW},dense=1",
    f"quest:summary=spread,{FEW}",
    f"exact_top_k:{FEW}",
    f"lserve:streaming=0.3,{FEW}",
]


@pytest.fixture(scope="module")
def ids(story):
    return story(400)


def random_tree(data, size=9):
    n = data.draw(st.integers(2, size))
    parents = [-1] + [data.draw(st.integers(0, node - 1)) for node in range(1, n)]
    tokens = np.arange(5, 5 + n, dtype=np.int32)  # no two alike: siblings differ
    origin = np.zeros(n, np.int16)
    origin[0] = -1
    return TokenTree(tokens, np.array(parents, np.int32), np.ones(n, np.float32), origin)


def path_to(tree, node):
    path = []
    while node >= 0:
        path.insert(0, int(tree.tokens[node]))
        node = tree.parents[node]
    return path


@pytest.mark.parametrize("name", ["quest", "exact_top_k", "quest:summary=spread"])
@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
def test_choosing_everything_changes_no_bit(opened, ids, name, kv_format):
    plain = run(opened(None, kv_format=kv_format), ids, 64)
    spec = f"{name}{',' if ':' in name else ':'}share=1,least=0,sinks=0,local=16"
    for chunk in (1, 37, 400):
        found = run(opened(spec, kv_format=kv_format), ids, chunk)
        np.testing.assert_array_equal(found, plain)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), length=st.sampled_from([3, 64, 130, 255, 330]))
def test_trees_that_choose_everything_change_no_bit(opened, ids, data, length):
    tree, spec = random_tree(data), "quest:share=1,least=0,sinks=0,local=32"
    rows = []
    for engine in (opened(None), opened(spec)):
        sequence = engine.start(ids[:length])
        rows.append(engine.forward([(sequence, tree)]).copy())
        engine.release(sequence)
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("spec", SPECS)
def test_native_reads_what_the_reference_reads(opened, ids, spec):
    native = run(opened(spec), ids, 100)
    reference = run(opened(spec, "reference"), ids, 100)
    plain = run(opened(None), ids, 100)
    gaps = np.abs(native - reference).max(1)
    # Runs of equal worth within rounding may be chosen otherwise: rare, and of little weight.
    assert np.median(gaps) < 1e-4
    assert (gaps > 1e-3).mean() < 0.05
    assert np.abs(native - plain).max() > 0.1


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_chunks_and_threads_change_no_bit(opened, ids, spec, kv_format):
    engine = opened(spec, kv_format=kv_format)
    whole = run(engine, ids, 400)
    for chunk in (1, 37, 256):
        np.testing.assert_array_equal(run(engine, ids, chunk), whole)
    engine.threads = 3
    np.testing.assert_array_equal(run(engine, ids, 100), whole)
    engine.threads = 1


@settings(max_examples=12, deadline=None)
@given(data=st.data(), spec=st.sampled_from(SPECS), length=st.sampled_from([3, 64, 130, 258, 330]))
def test_a_tree_equals_its_branches(opened, ids, data, spec, length):
    engine, tree = opened(spec), random_tree(data)
    sequence = engine.start(ids[:length], prompt=data.draw(st.booleans()))
    logits = engine.forward([(sequence, tree)]).copy()
    for node in range(len(tree)):
        alone = engine.forward([(sequence, TokenTree.chain(path_to(tree, node)))])
        np.testing.assert_array_equal(alone[-1], logits[node])
    deep = int(tree.depths().argmax())
    path, node = [], deep
    while node >= 0:
        path.insert(0, node)
        node = int(tree.parents[node])
    engine.forward([(sequence, tree)])
    engine.commit(sequence, path)
    text = np.r_[ids[:length], path_to(tree, deep)].astype(np.int32)
    again = engine.open()
    engine.set_prompt(again, engine.prompt_positions(sequence))
    engine.extend(again, text)
    root = TokenTree.root(7)
    np.testing.assert_array_equal(
        engine.forward([(sequence, root)]).copy(), engine.forward([(again, root)])
    )
    engine.release(sequence)
    engine.release(again)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_prompt_reads_everything(opened, ids, name):
    plain, engine = opened(None, name), opened(SPECS[0], name)
    whole = run(plain, ids, 400)
    found = run(engine, ids, 400, prompt=300)
    assert np.abs(found[:300] - whole[:300]).max() < (1e-9 if name == "native" else 1e-4)
    assert np.abs(found[300:] - whole[300:]).max() > 0.1
    sequence = engine.start(ids[:300], prompt=True)
    fork = engine.fork(sequence)
    engine.extend(fork, ids[300:310])
    assert engine.prompt_positions(fork) == 300
    assert plain.prompt_positions(plain.start(ids[:20])) == 20


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("drafter", "temperature"), [("recycle", 0.0), ("blend", 0.9)])
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


@pytest.mark.parametrize(
    "spec",
    [
        SPECS[0],
        "infllm:share=0.2,least=0,local=64,following=32",
        "squeezed:share=0.2,least=0,local=32,levels=2",
    ],
)
def test_a_server_continues_as_a_request_alone_does(spec):
    options = {"engine": "native", "drafter": "recycle", "budget": 8}
    lm = LM(shared("models", MODEL), attention=spec, **options)
    text = "Once upon a time there was a dog named Max. " * 12
    prompt = tuple(int(token) for token in lm.tokenizer.encode(text))
    worker = Worker(lm, prefix_cache=0.5)

    def serve(prompt):
        worker.submit(Job(str(len(prompt)), Request(prompt, 50)))
        found = None
        while not worker.idle:
            for event in worker.step():
                assert not event.error, event.error
                found = event.output or found
        return tuple(found.tokens)

    first = serve(prompt)
    longer = prompt + first + prompt[1:9]
    second = serve(longer)
    assert worker.stats.cached_tokens
    alone = Worker(lm, prefix_cache=0.0)
    worker.close()
    worker = alone
    assert serve(prompt) == first
    assert serve(longer) == second


def test_a_batch_changes_no_bit(opened, ids):
    engine = opened(SPECS[0])
    plain = [engine.start(ids[:n], prompt=n > 100) for n in (90, 200, 330)]
    root = TokenTree.chain([5, 6])
    alone = [engine.forward([(each, root)]).copy() for each in plain]
    together = engine.forward([(each, root) for each in plain])
    np.testing.assert_array_equal(np.concatenate(alone), together)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_deep_trees_stay_within_the_local_runs(opened, ids, name):
    engine = opened("quest:local=32,least=0", name)
    sequence = engine.start(ids[:130])
    depth = 40  # a chain, and a second first node
    parents = np.r_[-1, 0, 0, np.arange(2, depth)].astype(np.int32)
    tokens = np.r_[7, 9, np.full(depth - 1, 8)].astype(np.int32)
    origin = np.zeros(depth + 1, np.int16)
    origin[0] = -1
    tree = TokenTree(tokens, parents, np.ones(depth + 1, np.float32), origin)
    with pytest.raises(RequestError, match=r"the last 32 positions.*take a smaller budget"):
        engine.forward([(sequence, tree)])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_heads_that_copy_least_stream(opened, name):
    engine = opened(None, name)
    for streaming in (0, 0.5, 1):
        reads = np.array(patterns.parse(f"lserve:streaming={streaming}").head_reads(engine))
        assert (reads == HeadRead.NEAR).sum() == round(streaming * reads.size)
    first = np.array(patterns.parse("lserve:dense=1,streaming=1").head_reads(engine))[0]
    assert (first == HeadRead.ALL).all()
    scores = copying_heads(engine)
    assert all(((each > 0) & (each < 1)).all() for each in scores)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_caches_in_groups_are_refused(model, name):
    with pytest.raises(MethodError, match="pattern quest and kv_format=int4 do not go together"):
        open_engine(model, name, kv_format="int4", pattern=patterns.parse("quest"))


def test_bad_settings_are_refused():
    for spec, message in (
        ("quest:share=1.5", "quest:share is 1.5"),
        ("quest:local=0", "quest:local is 0"),
        ("quest:summary=median", "unknown quest:summary 'median'"),
        ("lserve:streaming=2", "lserve:streaming is 2"),
        ("exact_top_k:least=-1", "exact_top_k:least is -1"),
    ):
        with pytest.raises(MethodError, match=message):
            patterns.parse(spec)

"""Patterns that choose what blocks of a prompt read: both engines, however the prompt is run."""

import numpy as np
import pytest

from paceline import LM
from paceline.core import Request, TokenTree
from paceline.engines import open_engine
from paceline.engines.ensemble import EnsembleEngine
from paceline.engines.sparse_prefill import block_chunk, block_cut
from paceline.errors import MethodError, RequestError
from paceline.registry import patterns
from paceline.serving.messages import Job
from paceline.serving.worker import Worker
from tests.attention.conftest import run
from tests.conftest import shared

MODEL = "stories260K"
SPARSE = "block_sparse:threshold=0.5,local=1"
ALL = "block_sparse:threshold=1,local=1,sinks=0"


@pytest.fixture(scope="module")
def ids(story):
    return story(480)


@pytest.mark.parametrize("kv_format", ["fp32", "fp16", "int8"])
def test_reading_all_blocks_changes_no_bit(opened, ids, kv_format):
    plain = run(opened(None, kv_format=kv_format), ids, 64, 0)
    for chunk in (1, 100, 480):
        found = run(opened(ALL, kv_format=kv_format), ids, chunk, 450)
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    "spec", [SPARSE, "block_sparse:threshold=0.6,samples=3,sinks=0,local=2,dense=1"]
)
@pytest.mark.parametrize("kv_format", ["fp32", "int8"])
def test_chunks_and_threads_change_no_bit(opened, ids, spec, kv_format):
    engine = opened(spec, kv_format=kv_format)
    whole = run(engine, ids, 480, 450)
    assert np.abs(whole - run(opened(None, kv_format=kv_format), ids, 480, 450)).max() > 0.01
    for chunk in (1, 37, 130, 256):
        np.testing.assert_array_equal(run(engine, ids, chunk, 450), whole)
    engine.threads = 3
    np.testing.assert_array_equal(run(engine, ids, 100, 450), whole)
    engine.threads = 1


@pytest.mark.parametrize(
    "spec", [SPARSE, "block_sparse:threshold=0.6,samples=3,sinks=0,local=2,dense=1"]
)
def test_native_reads_what_the_reference_reads(opened, ids, spec):
    native = run(opened(spec), ids, 128, 450)
    reference = run(opened(spec, "reference"), ids, 200, 450)
    gaps = np.abs(native - reference).max(1)
    # Blocks whose shares are equal within rounding may be chosen otherwise: rare.
    assert np.median(gaps) < 1e-4
    assert (gaps > 1e-3).mean() < 0.05


@pytest.mark.parametrize("name", ["native", "reference"])
def test_only_whole_blocks_of_a_prompt_read_less(opened, ids, name):
    whole, tolerance = run(opened(None, name), ids, 480, 0), 1e-4
    for prompt, first in ((0, 480), (63, 480), (64 * 3, 480), (64 * 4 + 5, 64 * 3)):
        # The third block is the first one that has a choice.
        found = run(opened("block_sparse:threshold=0,local=1", name), ids, 480, prompt)
        gaps = np.abs(found - whole).max(1)
        first = min(first, 64 * 2 if prompt >= 64 * 3 else 480)
        assert gaps[:first].max() < tolerance
        assert first == 480 or gaps[first:].max() > 0.01


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_tree_behind_a_prompt_reads_everything(opened, ids, name):
    engine = opened(SPARSE, name)
    sequence = engine.start(ids[:400], prompt=True)
    tree = TokenTree.chain([5, 6, 7])
    logits = engine.forward([(sequence, tree)]).copy()
    engine.extend(sequence, np.array([5, 6], np.int32), chunk=1)
    last = engine.forward([(sequence, TokenTree.root(7))])
    np.testing.assert_allclose(last[-1], logits[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_parts_of_blocks_are_refused(opened, ids, name):
    engine = opened(SPARSE, name)
    sequence = engine.open()
    engine.set_prompt(sequence, 300)
    with pytest.raises(RequestError, match=r"whole blocks of 64 positions; found positions 0 to 5"):
        engine.forward([(sequence, TokenTree.chain(ids[:5]))])
    tokens, parents = np.arange(5, 69, dtype=np.int32), np.zeros(64, np.int32)
    parents[0] = -1
    tree = TokenTree(tokens, parents, np.ones(64, np.float32), parents.astype(np.int16))
    with pytest.raises(RequestError, match="as a tree"):
        engine.forward([(sequence, tree)])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_cut_prompt_begins_with_whole_blocks(opened, ids, name):
    engine = opened(SPARSE, name)
    sequence = engine.start(ids[:400], prompt=True)
    assert engine.prompt_positions(sequence) == 384
    assert [engine.cut_point(sequence, at) for at in (63, 64, 383, 384, 399)] == [
        0, 64, 320, 384, 399,
    ]  # fmt: skip
    fork = engine.fork(sequence)
    engine.truncate(fork, engine.cut_point(fork, 200))
    engine.set_prompt(fork, 450)
    engine.extend(fork, ids[192:450])
    whole = engine.start(ids[:450], prompt=True)
    root = TokenTree.root(7)
    expected = engine.forward([(whole, root)]).copy()
    np.testing.assert_allclose(engine.forward([(fork, root)]), expected, atol=1e-4, rtol=0)


def test_chunks_end_where_blocks_do():
    assert [block_chunk(0, 300, size) for size in (1, 64, 100, 256, 400)] == [64, 64, 64, 256, 400]
    assert block_chunk(192, 300, 10) == 64
    assert block_chunk(192, 300, 70) == 70  # beyond the whole blocks
    assert block_chunk(256, 300, 10) == 10
    assert [block_cut(at, 130) for at in (0, 65, 127, 128, 129)] == [0, 64, 64, 128, 129]


def test_a_batch_changes_no_bit(opened, ids):
    engine = opened(SPARSE)
    parts = [(0, 128), (128, 320), (384, 450)]
    sequences = []
    for begin, _ in parts:
        sequence = engine.open()
        engine.set_prompt(sequence, 450)
        engine.extend(sequence, ids[:begin])
        sequences.append(sequence)
    decoding = engine.start(ids[:333], prompt=True)
    batch = [
        (sequence, TokenTree.chain(ids[begin:end]))
        for sequence, (begin, end) in zip(sequences, parts, strict=True)
    ]
    batch.append((decoding, TokenTree.chain([5, 6])))
    alone = [engine.forward([each]).copy() for each in batch]
    np.testing.assert_array_equal(engine.forward(batch), np.concatenate(alone))


def test_members_of_an_ensemble_take_the_same_blocks(opened, ids):
    engine = EnsembleEngine([opened(SPARSE), opened(SPARSE)], [0.5, 0.5])
    whole = run(engine, ids, 480, 450)
    np.testing.assert_array_equal(run(engine, ids, 50, 450), whole)


@pytest.mark.parametrize(("drafter", "temperature"), [("recycle", 0.0), ("blend", 0.9)])
def test_drafting_gives_what_plain_decoding_gives(drafter, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 4}
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 8
    outputs = [
        LM(shared("models", MODEL), engine="native", drafter=d, budget=12, attention=SPARSE)
        .generate(prompt, **options)
        .tokens
        for d in (drafter, "plain")
    ]
    assert outputs[0] == outputs[1]


def test_a_server_continues_as_a_request_alone_does():
    lm = LM(shared("models", MODEL), engine="native", drafter="recycle", budget=8, attention=SPARSE)
    text = "Once upon a time there was a dog named Max. " * 12
    prompt = tuple(int(token) for token in lm.tokenizer.encode(text))

    def serve(worker, *prompts):
        found = {}
        for name, prompt in enumerate(prompts):
            worker.submit(Job(str(name), Request(prompt, 20)))
        while not worker.idle:
            for event in worker.step():
                assert not event.error, event.error
                if event.output:
                    found[event.id] = tuple(event.output.tokens)
        return [found[str(name)] for name in range(len(prompts))]

    cached, alone = Worker(lm, prefix_cache=0.5), Worker(lm, prefix_cache=0.0)
    [first] = serve(cached, prompt)
    others = [prompt + first + prompt[1:90], prompt[:200] + prompt[100:300], prompt[:150]]
    together = serve(cached, *others)
    assert cached.stats.cached_tokens
    assert serve(alone, prompt) == [first]
    assert [answer for each in others for answer in serve(alone, each)] == together
    cached.close()
    alone.close()


@pytest.mark.parametrize("name", ["native", "reference"])
def test_caches_in_groups_are_refused(model, name):
    with pytest.raises(MethodError, match="block_sparse and kv_format=int4 do not go together"):
        open_engine(model, name, kv_format="int4", pattern=patterns.parse("block_sparse"))


def test_bad_settings_are_refused():
    for spec, message in (
        ("block_sparse:threshold=1.5", "block_sparse:threshold is 1.5"),
        ("block_sparse:samples=65", "block_sparse:samples is 65"),
        ("block_sparse:local=0", "block_sparse:local is 0"),
        ("block_sparse:sinks=-1", "block_sparse:sinks is -1"),
    ):
        with pytest.raises(MethodError, match=message):
            patterns.parse(spec)

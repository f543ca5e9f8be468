"""Patterns that choose by earlier queries or by clusters of the prompt, in the reference engine."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.core import TokenTree
from paceline.engines.choose_clusters import choose_clusters, cluster_keys
from paceline.engines.few_read import FewRead
from paceline.engines.representatives import run_scores
from paceline.errors import MethodError, RequestError
from paceline.registry import patterns
from tests.attention.conftest import run
from tests.attention.test_few_read import path_to, random_tree
from tests.conftest import shared

MODEL = "stories260K"
SPECS = [
    "infllm:share=0.2,least=0,local=64,following=32,representatives=2",
    "squeezed:share=0.2,least=0,local=32,clusters=0.2",
    "squeezed:share=0.2,least=0,local=32,clusters=0.2,levels=2,dense=1",
]
PROMPT = 190


@pytest.fixture(scope="module")
def ids(story):
    return story(230)


@pytest.fixture(scope="module")
def opened(opened):
    return partial(opened, name="reference")


def test_a_run_promises_the_weight_of_all_its_keys_if_all_stand_for_themselves():
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randn(n, 64, 8, generator=generator) for n in (2, 4))
    asking = torch.randn(2, 3, 8, generator=generator)
    rule = FewRead("representatives", representatives=16, following=1)
    scores = run_scores(rule, asking, keys, queries)
    whole = (asking @ keys.mT).reshape(2, 3, 4, 16).logsumexp(-1)
    torch.testing.assert_close(scores, whole)


def test_representatives_are_the_keys_that_following_queries_like_best():
    keys = torch.zeros(1, 64, 2)
    keys[0, 5] = torch.tensor([1.0, 0.0])
    keys[0, 9] = torch.tensor([0.0, 1.0])
    queries = torch.zeros(1, 64, 2)
    queries[0, 20] = torch.tensor([0.0, 1.0])  # in the run that follows
    queries[0, 40] = torch.tensor([9.0, 0.0])  # behind it
    asking = torch.tensor([[[0.0, 4.0]]])
    for following, alone in ((1, 9), (2, 5)):
        rule = FewRead("representatives", representatives=1, following=following)
        others = (keys[0, :16].sum(0) - keys[0, alone]) / 15
        wanted = torch.logsumexp(
            torch.stack([keys[0, alone] @ asking[0, 0], others @ asking[0, 0] + np.log(15)]), 0
        )
        torch.testing.assert_close(run_scores(rule, asking, keys, queries)[0, 0, 0], wanted)


def test_clusters_of_alike_keys_are_found_and_read():
    angles = torch.tensor([0.0, 2.0, 4.0]).repeat(32)
    noise = 0.05 * torch.randn(96, generator=torch.Generator().manual_seed(1))
    keys = torch.stack([torch.cos(angles + noise), torch.sin(angles + noise)], -1)[None]
    rule = FewRead("centroids", share=1 / 3, sinks=0, local=1, clusters=3 / 96)
    clusters = cluster_keys(rule, keys)
    assert clusters.centroids.shape == (1, 3, 2)
    for kind in range(3):
        assert len(set(clusters.labels[0, kind::3].tolist())) == 1
    query = 3 * keys[:, 1:2]
    at, held = torch.tensor([96]), torch.arange(97)
    read = choose_clusters(rule, query, clusters, at, held, None)[0, 0]
    assert read[96]
    assert int(read.sum()) == 33
    assert read[torch.arange(1, 95, 3)].all()


@pytest.mark.parametrize("spec", ["infllm", "squeezed"])
def test_choosing_everything_changes_nothing(opened, ids, spec):
    opened_all = opened(f"{spec}:share=1,least=0,sinks=0")
    plain = run(opened(None), ids, 64, PROMPT)
    np.testing.assert_allclose(run(opened_all, ids, 64, PROMPT), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_change_nothing_and_a_prompt_reads_everything(opened, ids, spec):
    whole = run(opened(spec), ids, 230, PROMPT)
    plain = run(opened(None), ids, 230)
    np.testing.assert_allclose(whole[:PROMPT], plain[:PROMPT], atol=1e-4, rtol=0)
    assert np.abs(whole[PROMPT:] - plain[PROMPT:]).max() > 0.1
    gaps = np.abs(run(opened(spec), ids, 17, PROMPT) - whole).max(1)
    # Rows of equal worth within rounding may be chosen otherwise: rare, and of little weight.
    assert np.median(gaps) < 1e-4
    assert (gaps > 1e-3).mean() < 0.05


@settings(max_examples=6, deadline=None)
@given(data=st.data(), spec=st.sampled_from(SPECS), length=st.sampled_from([100, 222]))
def test_a_tree_equals_its_branches(opened, ids, data, spec, length):
    engine, tree = opened(spec), random_tree(data)
    sequence = engine.start(ids[:length], prompt=True)
    logits = engine.forward([(sequence, tree)]).copy()
    for node in range(len(tree)):
        alone = engine.forward([(sequence, TokenTree.chain(path_to(tree, node)))])
        np.testing.assert_allclose(alone[-1], logits[node], atol=1e-3, rtol=0)
    engine.release(sequence)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_cut_is_forgotten(opened, ids, spec):
    engine, root = opened(spec), TokenTree.root(7)
    fresh = engine.start(ids[:150], prompt=True)
    wanted = engine.forward([(fresh, root)]).copy()
    other = engine.start(np.r_[ids[:140], ids[:40]].astype(np.int32), prompt=True)
    engine.forward([(other, root)])
    engine.commit(other, [0])
    fork = engine.fork(other)
    engine.truncate(fork, 140)
    engine.set_prompt(fork, 150)
    engine.extend(fork, ids[140:150])
    np.testing.assert_allclose(engine.forward([(fork, root)]), wanted, atol=1e-3, rtol=0)
    for sequence in (fresh, other, fork):
        engine.release(sequence)


def test_queries_that_are_kept_count_as_memory(opened):
    page = opened(None).memory.page_bytes
    assert opened(SPECS[1]).memory.page_bytes == page
    assert opened(SPECS[0]).memory.page_bytes > page


@pytest.mark.parametrize("spec", SPECS)
def test_drafting_gives_what_plain_decoding_gives(spec):
    prompt = "Once upon a time there was a little dog named Max. He liked to run. " * 5
    outputs = []
    for drafter in ("recycle", "plain"):
        options = {"engine": "reference", "drafter": drafter, "budget": 12, "attention": spec}
        with LM(shared("models", MODEL), **options) as lm:
            outputs.append(lm.generate(prompt, max_new_tokens=24, temperature=0.0).tokens)
    assert outputs[0] == outputs[1]


def test_trees_leave_room_for_the_queries_that_choose(opened, ids):
    engine = opened("infllm:share=0.2,least=0,local=64,following=48")
    sequence = engine.start(ids[:150], prompt=True)
    parents = np.r_[-1, 0, 0, np.arange(2, 20)].astype(np.int32)
    tokens = np.r_[7, 9, np.full(19, 8)].astype(np.int32)
    origin = np.zeros(21, np.int16)
    origin[0] = -1
    tree = TokenTree(tokens, parents, np.ones(21, np.float32), origin)
    with pytest.raises(RequestError, match=r"the last 16 positions.*take a smaller budget"):
        engine.forward([(sequence, tree)])
    engine.release(sequence)


def test_bad_settings_are_refused():
    for spec, message in (
        ("infllm:following=128", "following is 128, expected at least 16 positions less"),
        ("infllm:representatives=17", "infllm:representatives is 17"),
        ("squeezed:clusters=0", "squeezed:clusters is 0"),
        ("squeezed:levels=3", "squeezed:levels is 3"),
    ):
        with pytest.raises(MethodError, match=message):
            patterns.parse(spec)

"""A pipeline of parts is one engine, bit for bit, whatever is run and whichever node is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline.core import TokenTree
from paceline.engines.cost_cache import known_cost
from paceline.engines.native import NativeEngine
from paceline.engines.part import Part, split_layers
from paceline.engines.pipeline import LocalNodes, PipelineEngine, StageLostError
from paceline.engines.pipeline.sequence import KeptRows
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import MemoryFullError, MethodError, ModelError, RequestError
from paceline.models import load
from paceline.models.config import LayerConfig
from tests.engines.test_missing_parts import without
from tests.engines.test_native import path_to, trees

FAMILIES = ("llama-gqa-tied-bias", "gpt_neox", "opt", "gemma2", "olmo2", "granite-bias")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give the shape and the weights of a tiny model with room for long texts."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder)
            known[name] = load(folder)
        model = known[name]
        return model.config, model.weights

    return get


def pipeline(engine, config, weights, parts, **options) -> PipelineEngine:
    """A pipeline in this process; `engine` is the class of its parts."""

    def open_part(index):
        return engine(config, weights, part=parts[index], **options)

    last = open_part(len(parts) - 1)
    return PipelineEngine(config, last, LocalNodes(open_part), len(parts) - 1)


def every_split(layers):
    """All divisions of three layers into two parts or three."""
    ends = [[1, layers], [layers - 1, layers], [1, 2, layers]]
    return [[Part(a, b, layers) for a, b in zip([0, *end[:-1]], end, strict=True)] for end in ends]


def lose(engine, index):
    engine._stages[index].lost = StageLostError("a test unplugged it")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("create", [NativeEngine, ReferenceEngine])
def test_logits_are_those_of_one_engine(create, name, models):
    config, weights = models(name)
    whole, ids = create(config, weights), tiny.tokens(40)
    tree = TokenTree.chain([5, 6, 7])
    expected = whole.forward([(whole.start(ids, chunk=16), tree)])
    hidden = whole.hidden()
    for parts in every_split(tiny.LAYERS):
        split = pipeline(create, config, weights, parts)
        found = split.forward([(split.start(ids, chunk=16), tree)])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(split.hidden(), hidden)
        assert (split.remote_layers, split.part) == (parts[-1].first, None)


class Pair:
    """One engine and a pipeline that are told the same."""

    def __init__(self, whole, split):
        self.whole, self.split = whole, split
        self.alive = [(whole.open(), split.open())]

    def run(self, data):
        chosen = data.draw(st.sets(st.integers(0, len(self.alive) - 1), min_size=1))
        batch = [(index, data.draw(trees(30))) for index in sorted(chosen)]
        room = self.whole.config.context
        batch = [(i, t) for i, t in batch if self.alive[i][0].length + len(t) <= room]
        rows = [data.draw(st.booleans()) for _ in batch]
        both = [
            engine.forward([(self.alive[i][place], tree) for i, tree in batch], rows).copy()
            for place, engine in enumerate((self.whole, self.split))
        ]
        np.testing.assert_array_equal(*both)
        for index, tree in batch:
            if data.draw(st.booleans()):
                path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
                self.whole.commit(self.alive[index][0], path)
                self.split.commit(self.alive[index][1], path)

    def change(self, action, data):
        index = data.draw(st.integers(0, len(self.alive) - 1))
        one, other = self.alive[index]
        if action == "fork":
            self.alive.append((self.whole.fork(one), self.split.fork(other)))
        elif action == "cut":
            wanted = data.draw(st.integers(0, one.length))
            length = self.whole.cut_point(one, wanted)
            assert self.split.cut_point(other, wanted) == length
            self.whole.truncate(one, length)
            self.split.truncate(other, length)
        elif len(self.alive) > 1:
            del self.alive[index]
            if action == "release":
                self.whole.release(one)
                self.split.release(other)


@pytest.mark.parametrize("kv_format", ["fp32", "int8", "int4"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_whatever_is_run_and_lost_every_bit_is_that_of_one_engine(kv_format, data, models):
    config, weights = models("llama-gqa-tied-bias")
    config = replace(config, context=512)
    parts = data.draw(st.sampled_from(every_split(tiny.LAYERS)))
    whole = NativeEngine(config, weights, kv_format=kv_format, threads=1)
    split = pipeline(NativeEngine, config, weights, parts, kv_format=kv_format, threads=1)
    pair, lost = Pair(whole, split), 0
    for _ in range(data.draw(st.integers(2, 10))):
        action = data.draw(
            st.sampled_from(("run", "run", "fork", "cut", "release", "drop", "lose"))
        )
        if action == "run":
            pair.run(data)
        elif action == "lose":
            index = data.draw(st.integers(0, len(parts) - 2))
            lost += split._stages[index].lost is None
            lose(split, index)
        else:
            pair.change(action, data)
    for one, other in pair.alive:
        assert one.length == other.length
        root = TokenTree.root(3)
        np.testing.assert_array_equal(whole.forward([(one, root)]), split.forward([(other, root)]))
    assert split.replaced == lost
    assert split.memory.used <= whole.memory.used + len(pair.alive)


def test_large_batches_go_through_in_pieces(models):
    config, weights = models("llama-gqa-tied-bias")
    config = replace(config, context=512)
    whole = NativeEngine(config, weights)
    split = pipeline(NativeEngine, config, weights, every_split(3)[-1])
    texts = [tiny.tokens(30 + index) for index in range(6)]
    trees_of = [TokenTree.chain(tiny.tokens(40)) for _ in texts]
    expected = whole.forward(list(zip(map(whole.start, texts), trees_of, strict=True))).copy()
    batch = list(zip(map(split.start, texts), trees_of, strict=True))
    runs = []
    local = split.inner.forward_part
    split.inner.forward_part = lambda *given: (runs.append(len(given[0])), local(*given))[1]
    np.testing.assert_array_equal(split.forward(batch), expected)
    assert runs == [2, 2, 2]
    for sequence, tree in batch:
        split.commit(sequence, np.arange(len(tree)))
    lose(split, 0)
    lose(split, 1)
    root = TokenTree.root(3)
    again = split.forward([(sequence, root) for sequence, _ in batch])
    for text, row in zip(texts, again, strict=True):
        fresh = whole.start(np.concatenate([text, tiny.tokens(40)]))
        np.testing.assert_array_equal(whole.forward([(fresh, root)])[0], row)


def test_a_replacement_shares_the_pages_that_were_shared(models):
    config, weights = models("llama-gqa-tied-bias")
    split = pipeline(NativeEngine, replace(config, context=512), weights, every_split(3)[0])
    first = split.start(tiny.tokens(200))
    others = [split.fork(first) for _ in range(5)]
    pages = split._stages[0].runner.engine.memory.used
    lose(split, 0)
    split.forward([(each, TokenTree.root(1)) for each in others])
    assert split._stages[0].runner.engine.memory.used <= pages + len(others)
    del others
    split.release(first)
    split.forward([(split.open(), TokenTree.root(1))])
    assert split._stages[0].runner.engine.memory.used == 1


def test_nodes_that_are_lost_again_and_again_end_a_pass_in_a_sentence(models):
    config, weights = models("opt")
    split = pipeline(NativeEngine, config, weights, every_split(3)[0])
    sequence, started = split.start(tiny.tokens(9)), split._nodes.start

    def broken(indices):
        stages = started(indices)
        for stage in stages:
            stage.run = lambda *_, answer=True: (_ for _ in ()).throw(StageLostError("it burnt"))
        return stages

    lose(split, 0)
    split._nodes.start = broken
    with pytest.raises(ModelError, match=r"5 nodes were lost in one pass.*it burnt"):
        split.forward([(sequence, TokenTree.root(1))])
    split._nodes.start = started
    lose(split, 0)
    assert split.forward([(sequence, TokenTree.root(1))]).shape == (1, config.vocab_size)


def test_a_full_memory_changes_nothing(models):
    config, weights = models("opt")
    split = pipeline(NativeEngine, config, weights, every_split(3)[0])
    split.kv_limit = split.memory.page_bytes
    one, other = split.start(tiny.tokens(9)), split.open()
    with pytest.raises(MemoryFullError):
        split.forward([(other, TokenTree.root(1))])
    split.release(one)
    whole = NativeEngine(config, weights)
    np.testing.assert_array_equal(
        split.forward([(other, TokenTree.root(1))]),
        whole.forward([(whole.open(), TokenTree.root(1))]),
    )


def test_what_a_pipeline_cannot_do_is_refused(models):
    config, weights = models("opt")
    split = pipeline(NativeEngine, config, weights, every_split(3)[0])
    sequence, tree = split.open(), TokenTree.root(1)
    part = split.inner
    with pytest.raises(RequestError, match="no views"):
        split.forward([(sequence, tree)], view=View(tokens=np.array([1], np.int32)))
    with pytest.raises(RequestError, match="twice"):
        split.forward([(sequence, tree), (sequence, tree)])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        split.forward([(sequence, TokenTree.root(10**6))])
    batch = [(part.open(), tree)]
    with pytest.raises(RequestError, match="layers 1 to 2 only"):
        part.forward(batch)
    with pytest.raises(RequestError, match="take the hidden states"):
        part.forward_part(batch, None)
    with pytest.raises(RequestError, match="expected float32"):
        part.forward_part(batch, np.zeros((2, 3), np.float32))
    with pytest.raises(MethodError, match="act=auto"):
        NativeEngine(config, weights, part=part.part, format="auto:act=auto")
    whole = NativeEngine(config, weights)
    whole_batch = [(whole.open(), tree)]
    with pytest.raises(RequestError, match="whole model"):
        whole.forward_part(whole_batch, None)
    with pytest.raises(RequestError, match="another engine"):
        split.forward(batch)
    for refused in (split.forward_part, split.forward_mixed):
        with pytest.raises(RequestError, match="pipeline"):
            refused(sequence, None, None)


def test_layers_without_attention_go_with_others(models):
    config, _ = models("llama-gqa-tied-bias")

    def layer(heads):
        return LayerConfig(heads, heads // 2, 10, 52, None, None)

    many = replace(config, layers=tuple(map(layer, (4, 4, 0, 0, 0, 4))))
    parts = split_layers(many, 3)
    assert [part.first for part in parts][1:] == [part.last for part in parts][:-1]
    assert all(any(each.heads for each in many.layers[p.first : p.last]) for p in parts)
    with pytest.raises(ModelError, match="3 layers with attention cannot be split into 4"):
        split_layers(many, 4)
    with pytest.raises(ModelError, match="no part"):
        Part(2, 2, 3)


def test_missing_sublayers_are_skipped_on_their_nodes(tmp_path):
    tiny.save("llama-gqa-tied-bias", tmp_path)
    config, weights = without(load(tmp_path), (1,), (2,))
    ids, tree = tiny.tokens(40), TokenTree.chain([5, 6, 7])
    for create in (NativeEngine, ReferenceEngine):
        whole = create(config, weights)
        expected = whole.forward([(whole.start(ids), tree)])
        split = pipeline(create, config, weights, [Part(0, 2, 3), Part(2, 3, 3)])
        np.testing.assert_array_equal(split.forward([(split.start(ids), tree)]), expected)


def test_the_head_counts_when_layers_are_divided(models):
    config, _ = models("llama-gqa-tied-bias")
    layer = config.layers[0]
    many = replace(config, layers=(layer,) * 20)
    even, heavy = split_layers(many, 2), split_layers(replace(many, vocab_size=500), 2)
    assert even[0].last <= heavy[0].last
    assert heavy[0].last > 10


def test_the_cost_of_passes_is_measured_with_the_nodes(models, tmp_path):
    config, weights = models("llama-gqa-tied-bias")
    split = pipeline(NativeEngine, replace(config, context=512), weights, every_split(3)[0])
    cost = known_cost(split, tmp_path)
    assert cost.nodes[-1] >= 32
    assert not list(tmp_path.iterdir())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_kept_rows_are_a_list(data):
    kept, plain = KeptRows(), []
    for _ in range(data.draw(st.integers(1, 20))):
        if data.draw(st.booleans()):
            rows = [data.draw(st.integers(0, 9)) for _ in range(data.draw(st.integers(0, 5)))]
            kept.append(np.array(rows, np.int32))
            plain += rows
        else:
            other = kept.fork()
            kept.truncate(length := data.draw(st.integers(0, len(plain))))
            assert other.rows().tolist() == plain
            del plain[length:]
        assert (len(kept), kept.fork().rows().tolist()) == (len(plain), plain)

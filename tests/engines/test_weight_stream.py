"""Layers that stream from disk: the same logits, within the budget, and clean ends of failures."""

import itertools
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paceline import LM, _native
from paceline.core import TokenTree
from paceline.engines.cost_cache import known_cost
from paceline.engines.native import NativeEngine
from paceline.engines.view import View
from paceline.engines.wrapper import EngineWrapper
from paceline.errors import ModelError, RequestError
from paceline.models import load
from paceline.models.tensors import Dense
from tests.conftest import shared
from tests.tiny import MODELS, save

SMALL = "stories260K"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model():
    return load(shared("models", SMALL))


_BUDGETS = {}


def smallest(model, **options):
    """The smallest budget, as the refusal of a smaller one tells it."""
    key = (model.path, options.get("format"))
    if key not in _BUDGETS:
        _BUDGETS[key] = refused_budget(model, **options)
    return _BUDGETS[key]


def refused_budget(model, **options):
    with pytest.raises(ModelError, match="expected at least") as caught:
        NativeEngine(model.config, model.weights, weights_memory=1, **options)
    return int(str(caught.value).split("at least ")[1].split(":")[0])


def streamed(model, more=0, **options):
    budget = smallest(model, **options) + more
    return NativeEngine(model.config, model.weights, weights_memory=budget, **options)


def running_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def binary(count):
    nodes = np.arange(count)
    return TokenTree.trusted(
        (nodes % 60).astype(np.int32),
        ((nodes + 1) // 2 - 1).astype(np.int32),
        np.ones(count, np.float32),
        np.where(nodes, 0, -1).astype(np.int16),
    )


def logits_of(engine, passes=3, view=None):
    """Logits of a prompt, of trees behind it and of a batch of two sequences."""
    one = engine.start(np.arange(1, 9, dtype=np.int32))
    other = engine.start(np.arange(5, 9, dtype=np.int32))
    rows = []
    for n in range(passes):
        rows.append(engine.forward([(one, binary(5 + n))], view=view).copy())
        rows.append(engine.forward([(one, binary(3)), (other, binary(4))]).copy())
        engine.commit(one, [0])
        engine.commit(other, [0, 1])
    engine.release(one)
    engine.release(other)
    return rows


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_those_of_weights_in_memory(model, isa, threads):
    whole = NativeEngine(model.config, model.weights, threads=threads, isa=isa)
    engine = streamed(model, threads=threads, isa=isa)
    assert engine.streamed_bytes > 0
    assert_same(logits_of(engine), logits_of(whole))


@pytest.mark.parametrize("name", sorted(MODELS)[::6])
@pytest.mark.parametrize("form", ["fp32", "int8", "int4:head=int8"])
def test_families_and_formats_stream(name, form, tmp_path):
    save(name, tmp_path / "model")
    tiny = load(tmp_path / "model")
    whole = NativeEngine(tiny.config, tiny.weights, format=form, threads=1)
    engine = streamed(tiny, format=form, threads=1)
    assert engine._model.streamed[0] == len(tiny.config.layers)
    assert_same(logits_of(engine, 1), logits_of(whole, 1))


def test_a_larger_budget_keeps_layers_and_a_whole_one_keeps_all(model):
    layers, all_bytes, _ = streamed(model)._model.streamed
    assert layers == len(model.config.layers)
    one = all_bytes // layers
    engine = streamed(model, more=2 * one)
    assert engine._model.streamed[:2] == (layers - 2, all_bytes - 2 * one)
    whole = streamed(model, more=all_bytes)
    assert whole._model.streamed == (0, 0, -1)
    assert_same(logits_of(engine), logits_of(whole))


def test_views_of_some_layers_alternate_with_whole_passes(model):
    whole, engine = NativeEngine(model.config, model.weights), streamed(model)
    for layers in ([0, 2], [1], [0, 1, 2, 4], list(range(len(model.config.layers)))):
        view = View(layers=np.array(layers, np.int32))
        assert_same(logits_of(engine, view=view), logits_of(whole, view=view))


def test_a_matrix_is_read_back(model):
    whole, engine = NativeEngine(model.config, model.weights), streamed(model)
    for name in ("layers.0.q", "layers.4.down", "embed"):
        np.testing.assert_array_equal(engine.dense(name), whole.dense(name))


def test_a_truncated_file_ends_the_pass_in_one_sentence_and_later_ones_too(model):
    engine = streamed(model)
    sequence = engine.start(np.arange(1, 9, dtype=np.int32))
    descriptor = engine._model.streamed[2]
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    for _ in range(3):
        with pytest.raises(ModelError, match=r"shorter than what was written|not those that were"):
            engine.forward([(sequence, binary(3))])
    with pytest.raises(RequestError, match="cannot commit"):
        engine.commit(sequence, [0])
    with pytest.raises(ModelError):
        engine.dense("layers.4.down")
    engine.release(sequence)


def test_changed_bytes_are_noticed_and_right_ones_go_on(model):
    engine, whole = streamed(model), NativeEngine(model.config, model.weights)
    descriptor = engine._model.streamed[2]
    size = os.fstat(descriptor).st_size
    file = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    right = os.pread(file, size, 0)
    os.pwrite(file, bytes([right[size // 2] ^ 1]), size // 2)
    with pytest.raises(ModelError, match="not those that were written"):
        logits_of(engine)
    os.pwrite(file, right, 0)
    os.close(file)
    assert_same(logits_of(engine), logits_of(whole))


def test_the_file_has_no_name_and_goes_with_the_engine(model, tmp_path):
    threads = running_threads()
    engine = streamed(model)
    logits_of(engine, 1)
    assert list((tmp_path / "cache" / "paceline").iterdir()) == []
    descriptor = engine._model.streamed[2]
    assert os.fstat(descriptor).st_nlink == 0
    assert running_threads() > threads
    del engine
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert running_threads() <= threads


def test_a_folder_that_cannot_be_written_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "plain file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "plain file"))
    with pytest.raises(ModelError, match=r"layers cannot stream from .*; set XDG_CACHE_HOME"):
        NativeEngine(model.config, model.weights, weights_memory=1)


def test_a_forked_process_is_told_and_does_not_hang(model):
    engine = streamed(model, threads=1)
    sequence = engine.start(np.arange(1, 9, dtype=np.int32))
    child = os.fork()
    if child == 0:  # must not come back to pytest
        code = 1
        try:
            engine.forward([(sequence, binary(3))])
        except ModelError as error:
            code = 0 if "forked process" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    engine.forward([(sequence, binary(3))])


def test_a_full_disk_is_told_and_leaves_nothing(model, tmp_path):
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ModelError, match=r"cannot write .*; free some space, or set XDG_CACHE"):
            NativeEngine(model.config, model.weights, weights_memory=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert list((tmp_path / "cache" / "paceline").iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_a_server_counts_what_is_in_memory(model):
    engine, budget = streamed(model), smallest(model)
    assert engine.weights_memory == budget < engine.weight_bytes
    assert EngineWrapper(engine).weights_memory == budget
    whole = NativeEngine(model.config, model.weights, weights_memory=1 << 80)
    assert whole.weights_memory is None
    assert whole.streamed_bytes == 0


def test_threads_may_change_and_sequences_stay_between_passes(model):
    engine, whole = streamed(model, threads=1), NativeEngine(model.config, model.weights)
    kept = []
    for each in (engine, whole):
        sequence = each.start(np.arange(1, 9, dtype=np.int32))
        each.threads = 2
        rows = each.forward([(sequence, binary(4))]).copy()
        each.commit(sequence, [0, 1])
        other = each.fork(sequence)
        kept.append([rows, each.forward([(sequence, binary(2)), (other, binary(9))]).copy()])
    assert_same(*kept)


@pytest.mark.parametrize("value", [0, -5, "much", 2.5, True, "600 apples"])
def test_a_budget_that_is_no_size_is_refused(value):
    with pytest.raises(RequestError, match=r"weights_memory is .*, expected a number of bytes"):
        LM(shared("models", SMALL), weights_memory=value)


def test_of_several_models_the_budget_is_refused():
    path = shared("models", SMALL)
    with pytest.raises(RequestError, match="weights_memory is that of one checkpoint"):
        LM(f"{path}:weight=0.5+{path}:weight=0.5", weights_memory="1MB")


def test_generation_is_the_same_with_trees_that_the_cost_allows(model, tmp_path):
    path, budget = shared("models", SMALL), smallest(model)
    with LM(path, weights_memory=budget) as lm, LM(path) as whole:
        options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 3}
        first = lm.generate("Once upon a time", **options)
        assert first.tokens == whole.generate("Once upon a time", **options).tokens
        assert lm.engine.head_screen.state == "off"
    cost = known_cost(streamed(model), tmp_path)
    assert cost.nodes[0] == 1
    assert len(list(tmp_path.glob("cost-*"))) == 1


def narrowed(model, sizes):
    """The model with MLPs of so many channels, those of every layer."""
    layers = [
        replace(own, intermediate=size)
        for own, size in zip(model.config.layers, sizes, strict=True)
    ]
    weights = {name: model.weights[name] for name in model.weights}
    for index, size in enumerate(sizes):
        for name in ("gate", "up", "down"):
            key = f"layers.{index}.{name}"
            dense = weights[key].dense()
            part = dense[:, :size] if name == "down" else dense[:size]
            weights[key] = Dense(np.ascontiguousarray(part), "F32")
    return replace(model.config, layers=tuple(layers)), weights


def fewest_streamed(sizes, room):
    """FlexGen's linear program in whole layers, over all placements.

    A layer x is in memory or on disk; the time that a pass waits for the disk is the sum of those
    there over its speed, whatever the order; those in memory must fit in the room that the two
    slots and what is no layer leave.
    """
    whole, best = sum(sizes), 0
    for kept in itertools.product((0, 1), repeat=len(sizes)):
        held = sum(itertools.compress(sizes, kept))
        best = max(best, held if held <= room else 0)
    return whole - best


def least_budget(config, weights):
    with pytest.raises(ModelError, match="expected at least") as caught:
        NativeEngine(config, weights, weights_memory=1, format="fp32")
    return int(str(caught.value).split("at least ")[1].split(":")[0])


def streamed_bytes(model, widths, more=0):
    """Bytes that a pass reads where `more` bytes are left to keep layers in memory."""
    config, weights = narrowed(model, widths)
    budget = least_budget(config, weights) + more
    return NativeEngine(config, weights, weights_memory=budget, format="fp32").streamed_bytes


@pytest.mark.parametrize("widths", [(172,) * 5, (172, 40, 172, 88, 40), (40, 172, 88, 172, 172)])
def test_the_placement_is_that_of_the_linear_program(model, widths):
    """In whole layers where all are of one size, and within one layer of it where they are not."""
    layers = len(widths)
    by_width = {each: streamed_bytes(model, (each,) * layers) // layers for each in set(widths)}
    sizes = [by_width[each] for each in widths]
    assert streamed_bytes(model, widths) == sum(sizes)
    slots = 2 * max(sizes)
    for share in np.linspace(0, 1, 9):
        room = int(share * sum(sizes))
        found, best = streamed_bytes(model, widths, room), fewest_streamed(sizes, room)
        if room + slots >= sum(sizes):  # then nothing needs a slot
            assert found == 0
        elif len(by_width) == 1:
            assert found == best
        else:
            assert best <= found < sum(sizes) - room + max(sizes)

"""Nodes in processes of their own: killed, frozen, with other files; no token ever changes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from paceline import LM
from paceline.core import TokenTree
from paceline.engines.native import NativeEngine
from paceline.engines.pipeline.opening import open_pipeline
from paceline.engines.pipeline.processes import ProcessNodes
from paceline.engines.pipeline.settings import Pipeline
from paceline.engines.pipeline.wire import Link, WireError
from paceline.errors import ModelError, RequestError
from paceline.models import load
from tests.conftest import shared

OPTIONS = {
    "threads": 1, "device": None, "weight_format": "auto", "kv_format": "auto",
    "weights_memory": None, "rope": None,
}  # fmt: skip
TEXT = (np.arange(90) % 200 + 3).astype(np.int32)


@pytest.fixture(scope="module")
def folder():
    return shared("models", "stories260K")


@pytest.fixture(scope="module")
def whole(folder):
    model = load(folder)
    return NativeEngine(model.config, model.weights)


@contextmanager
def opened(folder, pipeline):
    engine = open_pipeline(load(folder), folder, pipeline, "native", **OPTIONS)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def split(folder):
    with opened(folder, Pipeline(3)) as engine:
        yield engine


def processes(engine):
    return engine._nodes.processes


def check_alike(whole, split, ours, theirs):
    tree = TokenTree.chain([5, 6, 7, 8])
    expected = whole.forward([(ours, tree)])
    np.testing.assert_array_equal(split.forward([(theirs, tree)]), expected)


@pytest.mark.parametrize(("index", "how"), [(0, signal.SIGTERM), (1, signal.SIGKILL)])
def test_a_node_that_is_killed_is_replaced_without_a_bit_changed(whole, split, how, index):
    ours, theirs = whole.start(TEXT), split.start(TEXT)
    replaced = split.replaced
    check_alike(whole, split, ours, theirs)
    process = processes(split)[index]
    process.send_signal(how)
    process.wait(120)
    split.commit(theirs, [0, 1])  # the dead node never hears of it
    whole.commit(ours, [0, 1])
    check_alike(whole, split, ours, theirs)
    assert split.replaced == replaced + 1
    split.release(theirs)
    whole.release(ours)


def test_a_node_that_dies_in_the_middle_of_a_pass_is_replaced(whole, split):
    ours, theirs = whole.start(TEXT), split.start(TEXT)
    run, replaced = split._stages[1].run, split.replaced

    def killed(*given, **more):
        processes(split)[1].kill()  # it has the pass before it, or dies while it computes
        return run(*given, **more)

    split._stages[1].run = killed
    check_alike(whole, split, ours, theirs)
    assert split.replaced == replaced + 1
    assert split._stages[1].lost is None
    check_alike(whole, split, ours, theirs)


def test_a_node_that_is_silent_is_given_up(whole, folder):
    with opened(folder, Pipeline(2, silence=4)) as split:
        ours, theirs = whole.start(TEXT), split.start(TEXT)
        os.kill(processes(split)[0].pid, signal.SIGSTOP)
        check_alike(whole, split, ours, theirs)
        assert split.replaced >= 1
    assert not processes(split)


def test_every_node_may_be_gone_at_once(whole, split):
    ours, theirs = whole.start(TEXT), split.start(TEXT)
    for process in processes(split).values():
        process.kill()
    check_alike(whole, split, ours, theirs)
    fork, other = split.fork(theirs), whole.fork(ours)
    split.truncate(fork, 70)
    whole.truncate(other, 70)
    check_alike(whole, split, other, fork)


def changed_nodes(change):
    """Launch processes that are told something else than they should."""

    class Changed(ProcessNodes):
        def launch(self, index, told):
            super().launch(index, told | change(index))

    return Changed


@pytest.fixture
def copied(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    return copy


def other_files(copied):
    file = next(copied.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit of one weight
    file.write_bytes(data)
    return {"model": str(copied)}, "node 1.*has other files than this node"


def truncated_file(copied):
    file = next(copied.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    return {"model": str(copied)}, "node 1.*safetensors"


def no_file(copied):
    shutil.rmtree(copied)
    return {"model": str(copied)}, "node 1.*copy"


def other_layers(copied):
    return {"part": {"first": 0, "last": 9, "layers": 9}}, "node 1.*of 9 were asked for"


@pytest.mark.parametrize("fault", [other_files, truncated_file, no_file, other_layers])
def test_a_node_with_other_files_is_refused_in_a_sentence(fault, folder, copied):
    change, said = fault(copied)
    launch = changed_nodes(lambda index: change)
    with pytest.raises(ModelError, match=said) as caught, opened(folder, Pipeline(2, launch)):
        pass
    assert "\n" not in str(caught.value)


def test_a_replacement_with_other_files_ends_the_pass_in_a_sentence(folder, copied):
    told = {}
    with opened(folder, Pipeline(2, changed_nodes(lambda index: dict(told)))) as split:
        sequence = split.start(TEXT)
        told.update(other_files(copied)[0])
        processes(split)[0].kill()
        with pytest.raises(ModelError, match="has other files than this node"):
            split.forward([(sequence, TokenTree.root(1))])
        told.clear()
        assert split.forward([(sequence, TokenTree.root(1))]).shape[0] == 1


def test_a_process_that_ends_at_once_is_told_with_its_status(folder):
    launch = changed_nodes(lambda index: {"host": "127.0.0.1", "port": 1})
    said = r"attempts.*ended with status"
    with pytest.raises(ModelError, match=said), opened(folder, Pipeline(2, launch)):
        pass


def test_strangers_are_turned_away(folder, whole):
    strangers = []

    class Visited(ProcessNodes):
        def launch(self, index, told):
            for hello in (b"GET / HTTP/1.1\r\n\r\n" + bytes(40), None):
                stranger = socket.create_connection((told["host"], told["port"]))
                strangers.append(stranger)
                if hello is None:
                    Link(stranger).send({"kind": "hello", "token": "guessed", "index": index})
                else:
                    stranger.sendall(hello)
            super().launch(index, told)

    with opened(folder, Pipeline(2, Visited)) as split:
        check_alike(whole, split, whole.start(TEXT), split.start(TEXT))
        for stranger in strangers:
            stranger.settimeout(120)
            assert not stranger.recv(1)
            stranger.close()


def test_frames_are_what_was_sent_or_an_error():
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    first, second = Link(one), Link(other, delay=0.01)
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([], np.int32)]
    first.send({"kind": "run", "key": 3}, arrays)
    head, received = second.receive()
    assert (head["kind"], head["key"]) == ("run", 3)
    for sent, got in zip(arrays, received, strict=True):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(sent, got)
    one.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(WireError, match="another protocol"):
        second.receive()
    first.close()
    with pytest.raises(WireError):
        second.receive()
    with pytest.raises(WireError):
        first.send({})
    second.close()


def test_a_model_on_nodes_answers_as_one_does(folder):
    options = {"max_new_tokens": 60, "temperature": 0.8, "seed": 4, "ignore_eos": True}
    with LM(folder) as plain, LM(folder, pipeline=2, kv_format="int4") as lm:
        grouped = LM(folder, kv_format="int4")
        prompts = ["Once upon a time", "The dog"]
        expected = grouped.generate(prompts, **options)
        assert [each.tokens for each in lm.generate(prompts, **options)] == [
            each.tokens for each in expected
        ]
        processes(lm.engine)[0].kill()
        again = lm.generate(prompts[0], **options)
        assert again.tokens == expected[0].tokens
        assert plain.engine.remote_layers == 0 < lm.engine.remote_layers
        left = processes(lm.engine)
    assert not left


def test_nodes_that_die_with_several_passes_under_way_change_no_answer(folder):
    options = {"max_new_tokens": 30, "temperature": 0.8, "seed": 4, "ignore_eos": True}
    prompts = ["Once upon a time", "The dog", "One day", "Lily wanted to"]
    settings = {"threads": 1, "budget": 0}
    with LM(folder, **settings) as plain, LM(folder, pipeline=3, **settings) as lm:
        lm.generate(prompts[:2], max_new_tokens=1)  # measures the cost of passes
        expected = [plain.generate(each, **options).tokens for each in prompts]
        engine, passes, flying = lm.engine, 0, []
        begin = engine.begin

        def begins(batch, rows="all"):
            nonlocal passes
            passes += 1
            if passes in (5, 9):
                processes(engine)[passes % 2].kill()
                flying.append(len(engine._flights))
            return begin(batch, rows)

        engine.begin = begins
        found = lm.generate(prompts, **options)
        assert [each.tokens for each in found] == expected
        assert engine.replaced == 2
        assert min(flying) >= 1


@pytest.mark.parametrize("nodes", [1, 65, True, "2", 0.5])
def test_numbers_of_nodes_are_checked(nodes, folder):
    with pytest.raises(RequestError, match="pipeline"):
        LM(folder, pipeline=nodes)


@pytest.mark.parametrize("setting", [{"hop_seconds": -1}, {"silence": 0}, {"passes_in_flight": 0}])
def test_settings_of_a_pipeline_are_checked(setting):
    with pytest.raises(RequestError, match="expected"):
        replace(Pipeline(2), **setting)


def test_too_many_nodes_for_the_layers_are_refused(folder):
    with pytest.raises(ModelError, match="cannot be split into 60 parts"):
        LM(folder, pipeline=60)

"""A wrapper forwards everything that the engine contract has, also what comes later."""

import inspect

import numpy as np
import pytest

from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.engines.pages import Memory
from paceline.engines.wrapper import EngineWrapper
from tests.toy import ToyEngine

COMPOSED = {"start", "extend", "rewind", "forward_screened"}  # made of other operations
COMPOSED |= {"begin", "finish", "abandon", "passes_in_flight"}  # a wrapped engine runs one pass
MEMBERS = sorted(
    name
    for name in {*dir(Engine), *inspect.get_annotations(Engine)} - COMPOSED
    if not name.startswith("_")
)


class Recorder(ToyEngine):
    """Notes what is called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []


def recorded(name):
    def call(self, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        return f"result of {name}"

    return call


OPERATIONS = [name for name in MEMBERS if inspect.isfunction(getattr(Engine, name, None))]
ATTRIBUTES = [name for name in MEMBERS if name not in OPERATIONS]
for each in OPERATIONS:
    setattr(Recorder, each, recorded(each))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_forwarded(name):
    wrapper = EngineWrapper(inner := Recorder())
    needed = list(inspect.signature(getattr(Engine, name)).parameters)[1:]
    args = tuple(object() for _ in needed)
    returns = inspect.signature(getattr(Engine, name)).return_annotation != "None"
    assert getattr(wrapper, name)(*args) == (f"result of {name}" if returns else None)
    [(called, given, named)] = inner.calls
    assert called == name
    assert (*given, *named.values()) == args


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_attribute_is_the_inner_ones(name, monkeypatch):
    class Other(ToyEngine):
        memory = Memory(64, 3, 1, 4, 7)

    inner = Other()
    value = 64 * 7 if name == "kv_limit" else object()
    if name not in ("kv_limit", "memory"):
        setattr(inner, name, value)
    else:
        value = getattr(inner, name)
    assert getattr(EngineWrapper(inner), name) == value


def test_what_can_be_set_is_set_inside():
    limits = []

    class Limited(ToyEngine):
        memory = Memory(64, 0, 0, 0, None)

        def _limit_pages(self, pages):
            limits.append(pages)

    wrapper = EngineWrapper(inner := Limited())
    wrapper.threads, wrapper.shared, wrapper.kv_limit = 3, (lender := object()), 640
    assert (inner.threads, inner.shared, limits) == (3, lender, [10])


def test_composed_operations_pass_through_overrides():
    class Counting(EngineWrapper):
        passes = 0

        def forward(self, batch, rows="all", view=None):
            self.passes += 1
            return super().forward(batch, rows, view)

    wrapper = Counting(ToyEngine())
    sequence = wrapper.start(np.arange(7, dtype=np.int32), chunk=3)
    assert (sequence.length, wrapper.passes) == (7, 3)
    wrapper.forward([(sequence, TokenTree.root(1))])
    assert wrapper.passes == 4

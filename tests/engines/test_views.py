"""Views: a part of the model drafts, on both engines, and leaves no trace."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines import formats
from paceline.engines.native import FORMATS
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import RequestError
from tests.engines.test_native import (
    TOLERANCE,
    VARIED,
    as_ternary,
    native,
    path_to,
    tiny_model,
    trees,
)

__all__ = ["tiny_model"]  # the fixture


def ints(values) -> np.ndarray:
    return np.array(sorted(values), np.int32)


@st.composite
def views(draw, length: int) -> View:
    some = st.one_of(st.none(), st.sets(st.integers(0, tiny.LAYERS - 1)).map(ints))
    seen = st.one_of(st.none(), st.sets(st.integers(0, length - 1)).map(ints))
    wanted = st.one_of(st.none(), st.sets(st.integers(0, tiny.VOCAB - 1), min_size=1).map(ints))
    return View(draw(some), draw(seen), draw(wanted))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_views_agree_and_leave_no_trace(tiny_model, data) -> None:
    model = tiny_model(data.draw(st.sampled_from(VARIED)))
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 4))
    engine = native(model, isa=isa, threads=threads)
    reference = ReferenceEngine(model.config, model.weights)
    length, tree = data.draw(st.integers(1, 30)), data.draw(trees(12))
    prompt, view = tiny.tokens(length), data.draw(views(length))
    sequence, other = engine.start(prompt), engine.start(tiny.tokens(length, 1))
    plain = engine.forward([(sequence, tree)]).copy()
    viewed = engine.forward([(other, TokenTree.root(5)), (sequence, tree)], view=view)[1:].copy()

    expected = reference.forward([(reference.start(prompt), tree)], view=view)
    np.testing.assert_allclose(viewed, expected, atol=TOLERANCE, rtol=0)
    engine.threads = data.draw(st.integers(1, 4))
    path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
    alone = engine.forward([(sequence, TokenTree.chain(tree.tokens[path]))], view=view)
    np.testing.assert_array_equal(viewed[path], alone)

    np.testing.assert_array_equal(engine.forward([(sequence, tree)]), plain)
    engine.commit(sequence, path)
    follow = engine.forward([(sequence, TokenTree.root(7))]).copy()
    whole = engine.start(np.concatenate([prompt, tree.tokens[path]]))
    np.testing.assert_array_equal(follow, engine.forward([(whole, TokenTree.root(7))]))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_logits_behind_exits_are_those_of_the_layers_before_them(tiny_model, data) -> None:
    model = tiny_model(data.draw(st.sampled_from(VARIED)))
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 4))
    layers = ints(data.draw(st.sets(st.integers(0, tiny.LAYERS - 1), min_size=1)))
    exits = ints(data.draw(st.sets(st.integers(0, len(layers) - 1))))
    wanted = data.draw(st.sampled_from([None, ints([1, 5, 40])]))
    rows = data.draw(st.lists(st.booleans(), min_size=2, max_size=2))
    found = []
    for engine in (
        native(model, isa=isa, threads=threads),
        ReferenceEngine(model.config, model.weights),
    ):
        sequence, other = engine.start(tiny.tokens(9)), engine.start(tiny.tokens(6, 1))
        batch = [(other, TokenTree.root(5)), (sequence, TokenTree.chain([3, 4, 5]))]
        plain = engine.forward(batch).copy()
        separate = [View(layers[:count], None, wanted) for count in (*exits, len(layers))]
        parts = [engine.forward(batch, rows, each).copy() for each in separate]
        together = engine.forward(batch, rows, View(layers, None, wanted, exits)).copy()
        np.testing.assert_array_equal(together, np.concatenate(parts))
        states = engine.hidden().copy() if any(rows) else None
        engine.forward(batch, rows, separate[-1])
        if any(rows):
            np.testing.assert_array_equal(states, engine.hidden())
        np.testing.assert_array_equal(engine.forward(batch), plain)
        found.append(together)
    np.testing.assert_allclose(*found, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("storage", FORMATS)
def test_exits_of_the_whole_model_are_committed_with_it(storage: str, tiny_model) -> None:
    engine = native(tiny_model("gemma2"), format=storage)
    sequence, tree = engine.start(tiny.tokens(40)), TokenTree.chain([3, 4, 5])
    plain = engine.forward([(sequence, tree)]).copy()
    rows = engine.forward([(sequence, tree)], view=View(exits=ints(range(tiny.LAYERS))))
    assert len(rows) == (tiny.LAYERS + 1) * 3
    np.testing.assert_array_equal(rows[-3:], plain)
    engine.commit(sequence, [0, 1, 2])
    assert sequence.length == 43


@pytest.mark.parametrize("storage", FORMATS)
def test_a_view_of_everything_is_no_view(storage: str, tiny_model) -> None:
    engine = native(tiny_model("gemma2"), format=storage)
    sequence = engine.start(tiny.tokens(40))
    tree = TokenTree.chain([3, 4, 5])
    plain = engine.forward([(sequence, tree)]).copy()
    view = View(ints(range(tiny.LAYERS)), ints(range(40)), ints(range(tiny.VOCAB)))
    np.testing.assert_array_equal(engine.forward([(sequence, tree)], view=view), plain)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_logits_of_some_tokens_are_those_of_all(tiny_model, data) -> None:
    name = data.draw(st.sampled_from(("gemma2", "opt", "gpt_neox", "phi3")))
    head, isa = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(_native.isas()))
    model = tiny_model(name)
    if head == "ternary":  # no checkpoint has such a head yet
        weights = {
            n: as_ternary(w) if w.ndim == 2 else w for n, w in model.weights.to_arrays().items()
        }
        model = type(model)(model.path, model.config, weights, model.defaults)
    with mock.patch.object(formats, "HEADS", FORMATS):
        engine = native(model, format=f"fp32:head={head}", isa=isa)
    sequence, tree = engine.start(tiny.tokens(9)), data.draw(trees(30))
    plain = engine.forward([(sequence, tree)]).copy()
    for _ in range(2):
        wanted = ints(data.draw(st.sets(st.integers(0, tiny.VOCAB - 1), min_size=1)))
        for _ in range(2):  # gathered, and found again
            some = engine.forward([(sequence, tree)], view=View(tokens=wanted))
            np.testing.assert_array_equal(some, plain[:, wanted])
    assert engine.forward([(sequence, tree)], "none", View(tokens=wanted)).shape == (
        0,
        len(wanted),
    )


def test_skipped_layers_are_not_read(tiny_model) -> None:
    model = tiny_model("llama")
    spoiled = {
        name: np.full_like(values, 3e38) if name.startswith("layers.1.") else values
        for name, values in model.weights.to_arrays().items()
    }
    model = type(model)(model.path, model.config, spoiled, model.defaults)
    engine = native(model)
    sequence, tree = engine.open(), TokenTree.chain([3, 4])
    assert not np.isfinite(engine.forward([(sequence, tree)])).any()
    assert np.isfinite(engine.forward([(sequence, tree)], view=View(layers=ints([0, 2])))).all()


def test_unseen_positions_do_not_matter(tiny_model) -> None:
    engine = native(tiny_model("llama"))
    ids, view = tiny.tokens(30), View(positions=ints(range(20)))
    changed = np.concatenate([ids[:20], tiny.tokens(10, seed=5)])
    tree = TokenTree.chain([3, 4])
    one = engine.forward([(engine.start(ids), tree)], view=view).copy()
    np.testing.assert_array_equal(one, engine.forward([(engine.start(changed), tree)], view=view))


@pytest.mark.parametrize("kind", ["native", "reference"])
def test_views_are_never_committed(kind: str, tiny_model) -> None:
    model = tiny_model("llama")
    engine = native(model) if kind == "native" else ReferenceEngine(model.config, model.weights)
    assert engine.abilities >= {"layers", "positions", "tokens", "mixtures"}
    sequence = engine.start(tiny.tokens(4))
    for view in (View(layers=ints([0])), View(positions=ints([]))):
        engine.forward([(sequence, TokenTree.root(3))])
        engine.forward([(sequence, TokenTree.root(3))], view=view)
        with pytest.raises(RequestError, match="was a view, to draft only"):
            engine.commit(sequence, [0])
    engine.forward([(sequence, TokenTree.root(3))], view=View(tokens=ints([3])))
    engine.commit(sequence, [0])
    assert sequence.length == 5
    after = engine.forward([(sequence, TokenTree.root(4))]).copy()
    whole = engine.start(np.append(tiny.tokens(4), np.int32(3)))
    expected = engine.forward([(whole, TokenTree.root(4))])
    np.testing.assert_allclose(after, expected, atol=0 if engine.invariant else TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["native", "reference"])
@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View(layers=np.array([1, 0], np.int32)), "layers of a view are .* increasing"),
        (View(layers=np.array([1, 1], np.int32)), "layers of a view are .* increasing"),
        (View(layers=np.array([tiny.LAYERS], np.int32)), f"layers .* below {tiny.LAYERS}"),
        (View(layers=np.array([-1], np.int32)), "layers of a view are"),
        (View(positions=np.array([4], np.int32)), "positions of a view are .* below 4"),
        (View(positions=np.array([-2, 1], np.int32)), "positions of a view are"),
        (View(tokens=np.array([tiny.VOCAB], np.int32)), f"tokens of a view .* below {tiny.VOCAB}"),
        (View(tokens=np.array([5, 5], np.int32)), "tokens of a view are .* increasing"),
        (View(tokens=np.array([-1], np.int32)), "tokens of a view are"),
        (View(tokens=ints([])), "tokens of a view are .*, expected one at least"),
        (View(positions=np.array([0, 1])), "expected an int32 list"),
        (View(positions=np.zeros((1, 1), np.int32)), "expected an int32 list"),
        (View(layers=[0]), "expected an int32 list"),
        (View(exits=np.array([tiny.LAYERS], np.int32)), f"exits of a view .* below {tiny.LAYERS}"),
        (View(layers=ints([0, 2]), exits=ints([1, 2])), "exits of a view are .* below 2"),
        (View(exits=np.array([1, 1], np.int32)), "exits of a view are .* increasing"),
        (View(exits=np.array([-1], np.int32)), "exits of a view are"),
    ],
)
def test_bad_views_are_refused(kind: str, view: View, said: str, tiny_model) -> None:
    model = tiny_model("llama")
    engine = native(model) if kind == "native" else ReferenceEngine(model.config, model.weights)
    sequence = engine.start(tiny.tokens(4))
    with pytest.raises(RequestError, match=said):
        engine.forward([(sequence, TokenTree.root(3))], view=view)
    assert engine.forward([(sequence, TokenTree.root(3))]).shape == (1, tiny.VOCAB)

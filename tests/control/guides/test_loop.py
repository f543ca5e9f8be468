"""Guides in the loop, over toy engines: one pass for a tree, the same output, nothing left open."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.guides.base import guided, parse_guide
from paceline.core import Request, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.lenient import lenient_walk
from paceline.decoding.loop import Generation
from paceline.decoding.text_stream import TextStream
from paceline.drafters.base import Target
from paceline.engines.ensemble import EnsembleEngine
from paceline.errors import MethodError, PacelineError, RequestError
from paceline.registry import drafters
from tests.control.guides.beside_toy import SPECS, Other, ToyBeside, toy_request
from tests.decoding.test_loop import Root
from tests.decoding.test_text_stream import Letters
from tests.test_core import trees
from tests.toy import Oracle


def run(beside, drafter, request, budget=8):
    return Generation(beside.engine, drafter, request, Fixed(budget)).run()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=20),
    st.integers(1, 20),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=8, deadline=None)
def test_the_output_is_that_of_plain_decoding(spec, prompt, length, budget, temperature):
    beside = ToyBeside()
    request = toy_request(beside, spec, prompt, temperature, max_new_tokens=length)
    plain = run(beside, Root(), request)
    hostile = drafters.parse("hostile").build(Target(11, beside.engine))
    for drafter in (Oracle(beside.engine), hostile):
        assert run(beside, drafter, request, budget).tokens == plain.tokens
    assert beside.opened == 0
    assert plain.seconds.guide > 0
    assert plain.seconds.guide + plain.seconds.forward < plain.seconds.decode


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(trees(vocabulary=11), st.lists(st.integers(0, 10), max_size=6))
@settings(max_examples=8, deadline=None)
def test_every_node_of_a_tree_has_the_row_that_apply_finds_alone(spec, tree, text):
    beside, context = ToyBeside(), [1, 2, *text, int(tree.tokens[0])]
    request = toy_request(beside, spec, context)
    looked, alone = request.controls[0], toy_request(beside, spec, context).controls[0]
    looked.run_tree(np.array(context, np.int32), tree)
    sizes = watched(beside)
    expected = []
    for node in range(len(tree)):
        path, above = [], node
        while above > 0:
            path.insert(0, int(tree.tokens[above]))
            above = tree.parents[above]
        for size in range(len(path) + 1):  # `cfg:stop` is asked in order
            text = [*context, *path[:size]]
            found = looked.apply(beside.engine.logits_after(text), text)
        expected.append((text, found))
    assert not sizes, "a row that was there was run again"
    for text, found in expected:
        for size in range(len(context), len(text) + 1):
            again = alone.apply(beside.engine.logits_after(text[:size]), text[:size])
        assert np.array_equal(found, again)


def watched(beside):
    """A list to which every pass of every engine adds the size of its tree."""
    sizes = []
    for engine in beside.engines.values():

        def forward(batch, rows="all", view=None, original=engine.forward):
            assert view is None
            sizes.extend(len(tree) for _, tree in batch)
            return original(batch, rows)

        engine.forward = forward
    return sizes


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=40), st.integers(1, 30))
@settings(max_examples=8, deadline=None)
def test_a_text_that_was_read_in_parts_gives_the_same_rows(spec, text, most):
    beside, rows = ToyBeside(), []
    tree = TokenTree.chain([text[-1], 3, 4])
    for parts in (True, False):
        control = toy_request(beside, spec, text, max_new_tokens=5).controls[0]
        sizes = watched(beside)
        control.begin(beside.engine.open())
        if parts:
            context = np.array(text, np.int32)
            for _ in range(200):
                late = control.lag(context)
                if not late:
                    break
                assert 0 < control.follow(context, most) <= most
            assert not control.lag(context)
            assert max(sizes, default=0) <= most + 8  # of a stream, what rides with it
            sizes.clear()
        control.run_tree(np.array(text, np.int32), tree)
        if parts:
            assert max(sizes) <= len(tree) + 8
        history = [*text[:-1], text[-1]]
        rows.append(control.apply(beside.engine.logits_after(history), history))
        control.release()
    assert np.array_equal(*rows)


COSTS = {"proxy": 2, "contrastive": 1, "cleangen": 1, "cfg": 1, "gedi": 2, "air": 2}


@pytest.mark.parametrize("name", COSTS)
def test_a_tree_costs_one_pass_of_each_voice(name):
    beside = ToyBeside()
    request = toy_request(beside, SPECS[name])
    sizes, trees_run = watched(beside), []
    control = request.controls[0]
    look = control.run_tree

    def looking(context, tree):
        sizes.clear()
        look(context, tree)
        assert sizes == [len(tree)] * COSTS[name]
        trees_run.append(len(tree))

    control.run_tree = looking
    output = run(beside, Oracle(beside.engine), request)
    assert len(trees_run) == output.passes < 20
    assert max(trees_run) == 9


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupt_in_a_guides_pass_leaves_nothing_open(spec, after):
    beside = ToyBeside()
    request = toy_request(beside, spec, tuple(range(1, 10)))
    whole = run(beside, Root(), request)
    control, count = request.controls[0], 0
    stream = control.streams[-1]
    original = stream.engine.forward

    def impatient(batch, rows="all", view=None):
        nonlocal count
        if any(sequence is stream.follower._sequence for sequence, _ in batch):
            count += 1
            if count > after:
                raise KeyboardInterrupt
        return original(batch, rows, view)

    stream.engine.forward = impatient
    output = run(beside, Oracle(beside.engine), request, budget=2)
    if count > after:
        assert output.finish == "interrupted"
    assert output.tokens == whole.tokens[: len(output.tokens)]
    assert beside.opened == 0
    del stream.engine.forward
    assert run(beside, Oracle(beside.engine), request).tokens == whole.tokens


def test_a_closed_generation_leaves_nothing_open():
    beside = ToyBeside()
    request = toy_request(beside, SPECS["proxy"])
    stream = TextStream(Letters())
    pieces = iter(Generation(beside.engine, Root(), request, Fixed(0), stream))
    next(pieces)
    assert beside.opened == 3
    pieces.close()
    assert beside.opened == 0


def test_one_request_cannot_be_under_way_twice():
    beside = ToyBeside()
    request = toy_request(beside, SPECS["proxy"])
    first = iter(Generation(beside.engine, Root(), request, Fixed(0), TextStream(Letters())))
    text = next(first)
    with pytest.raises(RequestError, match="follows one text at a time"):
        run(beside, Root(), request)
    text += "".join(first)
    again = Generation(beside.engine, Root(), request, Fixed(0), TextStream(Letters()))
    assert "".join(again) == text
    assert beside.opened == 0


def test_a_text_may_be_asked_about_in_any_order():
    """As beams do: the answer depends on nothing but the text."""
    random = np.random.default_rng(0)
    texts = [[1, 2, 3, *random.integers(0, 11, size)] for size in (0, 5, 2, 9, 9, 1, 3)]
    for name, spec in SPECS.items():
        if name == "adaptive":
            continue
        beside = ToyBeside()
        one = toy_request(beside, spec).controls[0]
        for text in [*texts, *texts[::-1]]:
            other = toy_request(ToyBeside(), spec).controls[0]
            logits = beside.engine.logits_after(text)
            assert np.array_equal(one.apply(logits, text), other.apply(logits, text)), name


# ------------------------------------------------------------------------- Adaptive Guidance


def test_guidance_stops_for_good_where_both_agree():
    beside, compared = ToyBeside(), []
    request = toy_request(beside, "cfg:negative=x,scale=3,stop=0.8", max_new_tokens=30)
    control, engine = request.controls[0], beside.engine

    def softmax(logits):
        powers = np.exp(logits.astype(np.float64) - logits.max())
        return powers / powers.sum()

    own, ended = [1, 2, 3], False
    for _ in range(30):
        logits = engine.logits_after(own)
        other = engine.logits_after([*beside.tokenizer.encode("x"), *own[3:]])
        guided = logits if ended else logits + 2 * (logits - other)
        compared.append(ended)
        ended = ended or 0.5 * np.abs(softmax(logits) - softmax(other)).sum() <= 0.8
        own.append(int(guided.argmax()))
    assert not compared[0]
    assert compared[-1], "both never agreed"
    first = run(beside, Root(), request)
    assert first.tokens == own[3:]
    assert run(beside, Oracle(engine), request).tokens == own[3:]

    looks, follower = [], control.streams[0].follower
    ran = follower.ran
    follower.ran = lambda tree: looks.append(1) or ran(tree)
    run(beside, Root(), request)
    assert len(looks) == compared.index(True)


def test_what_depends_on_the_order_says_so():
    beside = ToyBeside()
    control = toy_request(beside, SPECS["adaptive"]).controls[0]
    with pytest.raises(RequestError, match=r"cfg:stop was called out of order"):
        control.apply(beside.engine.logits_after([1]), [1, 2, 3, 4, 5])


# ----------------------------------------------------------------------------- composition


def test_guides_with_a_defined_order_compose():
    beside = ToyBeside()
    specs = ["gedi:b,xy,z", "proxy:b,c", "contrastive:c,alpha=0.05"]
    plain = Request((1, 2, 3), 16, 0.0, 3)
    request = guided(plain, [parse_guide(spec) for spec in specs], beside)
    alone = [toy_request(beside, spec, max_new_tokens=16).controls[0] for spec in specs[::-1]]
    logits = expected = beside.engine.logits_after([1, 2, 3])
    for control in alone:
        expected = control.apply(expected, [1, 2, 3])
    for control in request.controls:
        logits = control.apply(logits, [1, 2, 3])
    assert np.array_equal(logits, expected)
    for control in alone:
        control.release()
    found = run(beside, Root(), request)
    assert run(beside, Oracle(beside.engine), request).tokens == found.tokens
    assert beside.opened == 0
    with pytest.raises(
        MethodError, match="the guide cfg and the guide contrastive do not go together: no order"
    ):
        guided(plain, [parse_guide("cfg"), parse_guide("contrastive:b")], beside)
    with pytest.raises(
        MethodError, match="the guide air and the guide gedi do not go together: no order"
    ):
        guided(plain, [parse_guide("air:b,x,y"), parse_guide("gedi:b,x,y")], beside)


def test_an_ensemble_is_guided_as_one_model():
    beside = ToyBeside()
    beside.engine = EnsembleEngine([beside.engines["a"], Other(5)], [0.5, 0.5])
    request = toy_request(beside, "cfg:negative=xyz,scale=3")
    plain = run(beside, Root(), request)
    assert run(beside, Oracle(beside.engines["a"]), request).tokens == plain.tokens
    with pytest.raises(MethodError, match="guide dola and the engine ensemble do not go together"):
        toy_request(beside, "dola")


def test_other_walks_are_guided_too():
    beside = ToyBeside()
    request = toy_request(beside, "proxy:b,c,alpha=4")
    tree, context = TokenTree.chain([3, 4, 5]), [1, 2, 3]
    logits = np.stack([beside.engine.logits_after([*context, 4, 5][: 3 + n]) for n in range(3)])
    request.controls[0].run_tree(np.array(context, np.int32), tree)
    walked = lenient_walk(tree, logits, [*context], request, 0.0)
    expected = request.controls[0].apply(logits[0], context)
    assert walked.drawn[0] == int(expected.argmax())


def test_a_guide_with_too_small_a_context_is_refused():
    beside = ToyBeside()
    beside.engines["b"] = Other(1, context=30)
    toy_request(beside, "contrastive:b", max_new_tokens=28)
    with pytest.raises(RequestError, match="sees 30 tokens, and this request may come to 31"):
        toy_request(beside, "contrastive:b", max_new_tokens=29)
    with pytest.raises(RequestError, match="a guide sees 64 tokens"):
        toy_request(beside, f"cfg:negative={'x' * 40}", max_new_tokens=40)
    request = toy_request(beside, "contrastive:b", max_new_tokens=28)
    assert len(run(beside, Oracle(beside.engine), request).tokens) == 28


def test_a_guide_whose_vocabulary_is_padded_otherwise():
    """The padding that the guide lacks has its lowest logit; what the guide has more is cut off."""
    beside = ToyBeside()
    logits = beside.engine.logits_after([1, 2, 3])
    for size in (9, 13):
        beside.engines["b"] = Other(1, vocab_size=size)
        row = beside.engines["b"].logits_after([1, 2, 3])
        amateur = np.append(row, [row.min()] * 2) if size == 9 else row[:11]
        control = toy_request(beside, "contrastive:b,alpha=0,beta=1").controls[0]
        assert control.apply(logits, [1, 2, 3]) == pytest.approx(2 * logits - amateur, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("praxy:b,c", "guide 'praxy'"),
        ("proxy", "proxy needs tuned; write proxy:tuned=VALUE"),
        ("proxy:b", "proxy needs base"),
        ("proxy:b,c,1,2", "the value '2' has no key"),
        ("proxy:b,c,alpha=nan", "proxy:alpha is nan"),
        ("proxy:b,c,alpha=x", "proxy:alpha is 'x', expected float"),
        ("contrastive:b,alpha=2", "contrastive:alpha is 2"),
        ("contrastive:b,beta=-1", "contrastive:beta is -1"),
        ("cleangen:b,factor=0.5", "cleangen:factor is 0.5"),
        ("cfg:scale=-1", "cfg:scale is -1"),
        ("cfg:stop=2", "cfg:stop is 2"),
        ('cfg:negative="half', "a quotation mark that nothing closes"),
        ("gedi:b,x", "gedi needs negative"),
        ("gedi:b,x,y,rho=2", "gedi:rho is 2"),
        ("air:b,x,y,omega=inf", "air:omega is inf"),
        ("dola:alpha=-1", "dola:alpha is -1"),
        ("dola", "the guide dola and the engine toy do not go together"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(spec, said):
    with pytest.raises(PacelineError, match=said):
        toy_request(ToyBeside(), spec)


@given(st.text('abcdefgilnoprxy:=,."0123\\ ', max_size=24) | st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_guide_or_refused(text):
    for begin in ("", "cfg:", "gedi:b,", "contrastive:b,"):
        with suppress(PacelineError, KeyError):  # KeyError: a toy model that is not there
            toy_request(ToyBeside(), begin + text)

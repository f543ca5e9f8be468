"""A session by itself: its limits, the parts of its prompt, and what it accepts."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.core import Request, TokenTree
from paceline.decoding.session import Session, give_hidden
from paceline.decoding.text_stream import TextStream
from paceline.decoding.walk import WalkResult
from paceline.drafters.base import Drafter
from paceline.errors import RequestError
from tests.decoding.test_text_stream import Letters
from tests.toy import Oracle, ToyEngine


class Chains(Drafter):
    """Proposes chains of one token; keeps what it was asked and shown."""

    origins, top_k = ("chains",), 2

    def __init__(self):
        self.asked, self.begun, self.seen = [], 0, []

    def begin(self, request):
        self.begun += 1

    def propose(self, context, budget, min_path_prob=0.0):
        self.asked.append((context.tolist(), budget, min_path_prob))
        return TokenTree.chain([int(context[-1])] + [1] * budget)

    def forced_tree(self, context, budget):
        self.asked.append((context.tolist(), "forced", budget))
        return TokenTree.chain([int(context[-1])] + [2] * budget)

    def observe(self, step):
        self.seen.append(step)


def opened(drafter=None, engine=None, prompt=(1, 2, 3), stream=None, margins=False, **options):
    asked = Request(prompt=prompt, **{"max_new_tokens": 20, **options})
    session = Session(engine or ToyEngine(), drafter or Chains(), asked, stream, margins)
    session.open()
    return session


def prefilled(*arguments, **options):
    session = opened(*arguments, **options)
    while session.missing:
        tree = session.next_part()
        session._engine.forward([(session.sequence, tree)])
        session.commit_part(tree, None)
    return session


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (1,) * 64}, "the prompt has 64 tokens, but the model sees 64"),
        ({"prompt": (1, 11)}, "token 11 is outside the vocabulary of 11"),
        ({"prompt": (-1, 1)}, "token -1 is outside the vocabulary of 11"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": float("inf")}, "temperature is inf, expected 0 or more"),
        ({"temperature": -0.1}, "temperature is -0.1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0 or more"),
    ],
)
def test_a_request_is_within_the_limits_of_the_model(options, message):
    with pytest.raises(RequestError, match=message):
        opened(**options)


def test_the_limits_themselves_are_allowed():
    assert opened(prompt=(0, 10), max_new_tokens=1, temperature=0.0).room == 0
    assert opened(prompt=(1,) * 63).room == 0


@pytest.mark.parametrize(
    ("new", "room", "finish"), [(60, 59, "length"), (61, 60, "length"), (62, 60, "context")]
)
def test_the_output_ends_at_its_limit_or_the_models(new, room, finish):
    session = opened(max_new_tokens=new)
    assert (session.room, session.levels, session.output.finish) == (room, room, finish)


def test_a_session_without_a_sequence_lacks_all_but_the_last_token():
    drafter = Chains()
    session = Session(ToyEngine(), drafter, Request((1, 2, 3), 20))
    assert (session.missing, session.row_count, session.sequence) == (2, 0, None)
    assert (session.done, session.hidden, session.guides) == (False, None, [])
    assert drafter.begun == 0
    session.open()
    session.close()
    session.open()
    assert drafter.begun == 1, "a request that is preempted begins once"
    session.close()
    session.close()
    assert (session.sequence, session._engine.opened) == (None, 0)


def test_the_prompt_is_run_in_parts():
    session = opened(engine=ToyEngine(context=600), prompt=(1,) * 300)
    assert session.missing == 299
    for most, size in ((None, 256), (40, 40), (40, 3)):
        tree = session.next_part() if most is None else session.next_part(most)
        assert len(tree) == size
        session._engine.forward([(session.sequence, tree)])
        session.commit_part(tree, None)
    assert session.missing == 0


@pytest.mark.parametrize(("vocabulary", "size"), [(11, 256), (1 << 16, 128), (1 << 22, 16)])
def test_parts_with_logits_for_the_drafter_are_small(vocabulary, size):
    engine = ToyEngine(vocab_size=vocabulary, context=600)
    session = opened(Oracle(ToyEngine()), engine, (1,) * 300)
    assert session.wants_prefill_logits
    assert len(session.next_part()) == size
    assert len(opened(Chains(), engine, (1,) * 300).next_part()) == 256


def test_a_drafter_that_learns_from_the_prompt_sees_every_part():
    engine = ToyEngine()
    drafter = Oracle(engine)
    session = opened(drafter, engine, (1, 2, 3, 4, 5))
    for most in (3, 1):
        tree = session.next_part(most)
        logits = engine.forward([(session.sequence, tree)])
        session.commit_part(tree, logits)
    first, second = drafter.seen
    assert (first.context.tolist(), second.context.tolist()) == ([1], [1, 2, 3, 4])
    assert (first.drawn.tolist(), second.drawn.tolist()) == ([2, 3, 4], [5])
    assert (first.path.tolist(), second.path.tolist()) == ([0, 1, 2], [0])
    assert first.top_tokens.shape == (3, 2)


def test_a_tree_is_no_deeper_than_the_room():
    session = prefilled(max_new_tokens=4)
    assert session.propose(9, min_path_prob=0.25).tokens.tolist() == [3, 1, 1, 1]
    assert session.drafter.asked == [([1, 2, 3], 9, 0.25)]
    assert session.propose(0).tokens.tolist() == [3]
    assert session.propose(0, 2).tokens.tolist() == [3, 2, 2]
    assert session.propose(0, 9).tokens.tolist() == [3, 2, 2, 2]
    assert session.drafter.asked[1:] == [([1, 2, 3], "forced", 2), ([1, 2, 3], "forced", 3)]
    last = prefilled(max_new_tokens=1)
    assert last.propose(9).tokens.tolist() == last.propose(0, 9).tokens.tolist() == [3]
    assert last.drafter.asked == []


def test_a_pass_is_counted_and_shown_to_a_drafter_that_drafted():
    session = prefilled()
    for nodes, seen in ((2, 1), (0, 1)):
        tree = session.propose(nodes)
        logits = session._engine.forward([(session.sequence, tree)])
        walked = session.verify(tree, logits)
        session.learn(tree, logits, walked)
        assert session.accept(tree, walked) == [""] * len(walked.drawn)
        assert len(session.drafter.seen) == seen
    assert (session.output.passes, session.output.nodes) == (2, 4)
    assert session.text.tolist() == [1, 2, 3, *session.output.tokens]
    assert session.missing == 0
    [step] = session.drafter.seen
    assert step.context.tolist() == [1, 2, 3]
    assert step.top_tokens.shape == (3, 2)
    assert step.drawn.tolist() == session.output.tokens[: len(step.drawn)]


def accepted(drawn, margins=(), **options):
    """What a session says of drawn tokens, the accepted nodes being a chain."""
    session = opened(margins=bool(margins), **options)
    tree = TokenTree.chain([3] * len(drawn))
    texts = session.accept(tree, WalkResult(list(range(len(drawn))), list(drawn), list(margins)))
    return session, texts


def test_accepted_tokens_are_credited_but_for_the_first():
    session, texts = accepted((5, 6, 7), margins=(0.5, 1.5, 2.5))
    assert (session.output.tokens, texts, session.done) == ([5, 6, 7], ["", "", ""], False)
    assert session.output.accepted == {"chains": 2}
    assert session.output.margins == [0.5, 1.5, 2.5]
    session, _ = accepted((5,))
    assert (session.output.accepted, session.output.margins) == ({}, [])


def test_an_output_ends_at_a_stop_token_or_its_length():
    session, _ = accepted((5, 6, 7), stop_tokens=frozenset({6}))
    assert (session.output.tokens, session.done, session.output.finish) == ([5, 6], True, "stop")
    assert session.output.accepted == {"chains": 1}
    for new, done in ((3, True), (4, False)):
        session, _ = accepted((5, 6, 7), max_new_tokens=new)
        assert (session.done, session.output.finish) == (done, "length")


def test_an_output_ends_at_a_stop_string():
    engine = ToyEngine(vocab_size=200)
    stream = TextStream(Letters(), ("bc",))
    session, texts = accepted([*b"abcd"], engine=engine, stream=stream)
    assert (texts, session.output.text) == (["a", "", ""], "a")
    assert (session.done, session.output.finish) == (True, "stop")
    assert session.output.tokens == [*b"abc"]
    stream = TextStream(Letters(), ("bc",))
    session, texts = accepted([*b"ab"], engine=engine, stream=stream, max_new_tokens=2)
    assert (texts, session.output.text) == (["a", "b"], "ab")
    assert (session.done, session.output.finish) == (True, "length")


def test_hidden_states_go_to_the_drafters_that_need_them():
    class Needs(Chains):
        needs_hidden = True

    engine = ToyEngine()
    states = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    engine.hidden = lambda: states
    sessions = [opened(Needs()), opened(Chains()), opened(Needs()), opened(Needs())]
    give_hidden(engine, sessions, [2, 1, 0, 3])
    found = [None if each.hidden is None else each.hidden.tolist() for each in sessions]
    assert found == [states[:2].tolist(), None, None, states[3:].tolist()]
    engine.hidden = None
    give_hidden(engine, [opened(Chains())], [1])

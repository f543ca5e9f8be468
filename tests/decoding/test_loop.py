from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.control.temperature import Temperature
from paceline.core import Cost, Request, TokenTree
from paceline.decoding.governor import Fixed, Governor
from paceline.decoding.loop import Generation
from paceline.decoding.session import Session, give_hidden
from paceline.decoding.text_stream import TextStream
from paceline.decoding.walk import WalkResult
from paceline.drafters.base import Drafter
from paceline.errors import RequestError
from tests.decoding.test_text_stream import Bytes, Letters
from tests.toy import Oracle, ToyEngine


class Root(Drafter):
    origins = ("plain",)

    def propose(self, context, budget, min_path_prob=0.0):
        return TokenTree.root(int(context[-1]))


def request(*prompt, **options):
    return Request(prompt=prompt or (1, 2, 3), **{"max_new_tokens": 20, **options})


def run(engine, drafter, asked, budget=8, stream=None):
    return Generation(engine, drafter, asked, Fixed(budget), stream).run()


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=40),
    st.integers(1, 30),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 9),
)
def test_the_drafter_does_not_change_the_output(prompt, length, budget, temperature, seed):
    engine = ToyEngine()
    controls = (Temperature(temperature),) if temperature else ()
    asked = request(
        *prompt, max_new_tokens=length, temperature=temperature, seed=seed, controls=controls
    )
    plain = run(engine, Root(), asked)
    drafted = run(engine, Oracle(engine), asked, budget)
    assert drafted.tokens == plain.tokens
    assert drafted.finish == plain.finish
    assert plain.passes == len(plain.tokens)
    assert drafted.passes <= plain.passes
    assert engine.opened == 0


def test_good_guesses_save_passes_and_are_credited():
    engine = ToyEngine()
    output = run(engine, Oracle(engine), request(max_new_tokens=20), budget=8)
    assert output.passes == 4
    assert output.accepted == {"oracle": 16}
    assert output.tokens_per_pass == 5


def test_learning_sees_the_prompt_then_every_pass():
    engine = ToyEngine()
    drafter = Oracle(engine)
    output = run(engine, drafter, request(1, 2, 3, 4), budget=4)
    prompt = drafter.seen[0]
    assert prompt.tree.tokens.tolist() == [1, 2, 3]
    assert prompt.drawn.tolist() == [2, 3, 4]
    assert prompt.context.tolist() == [1]
    text = [1, 2, 3, 4, *output.tokens]
    place = 4
    for step in drafter.seen[1:]:
        assert step.context.tolist() == text[:place]
        assert step.drawn.tolist() == text[place : place + len(step.drawn)]
        assert step.top_tokens[0, 0] == engine.logits_after(text[:place]).argmax()
        place += len(step.drawn)


def test_a_stop_token_inside_an_accepted_path_ends_the_output():
    engine = ToyEngine()
    plain = run(engine, Root(), request())
    stop = plain.tokens[5]
    first = plain.tokens.index(stop)
    asked = request(stop_tokens=frozenset([stop]))
    for drafter in (Root(), Oracle(engine)):
        output = run(engine, drafter, asked, budget=16)
        assert output.tokens == plain.tokens[: first + 1]
        assert output.finish == "stop"


def test_a_stop_string_inside_an_accepted_path_ends_the_text():
    engine = ToyEngine()
    plain = run(engine, Root(), request())
    text = "".join(map(chr, plain.tokens))
    stop = text[6:8]
    asked = request(stop_strings=(stop,))
    for drafter in (Root(), Oracle(engine)):
        output = run(engine, drafter, asked, 16, TextStream(Letters(), (stop,)))
        assert output.text == text[: text.find(stop)]
        assert output.finish == "stop"
        assert "".join(map(chr, output.tokens)) == text[: text.find(stop) + 2]


def test_the_context_ends_the_output():
    engine = ToyEngine(context=10)
    output = run(engine, Oracle(engine), request(max_new_tokens=50), budget=8)
    assert len(output.tokens) == 7
    assert output.finish == "context"


def test_an_interrupt_keeps_what_there_is():
    engine = ToyEngine()

    class Impatient(Oracle):
        def propose(self, context, budget, min_path_prob=0.0):
            if len(context) > 10:
                raise KeyboardInterrupt
            return super().propose(context, budget, min_path_prob)

    output = run(engine, Impatient(engine), request(), budget=2)
    assert output.finish == "interrupted"
    assert output.tokens == run(engine, Root(), request()).tokens[: len(output.tokens)]
    assert len(output.tokens) >= 8
    assert engine.opened == 0


def test_margins_are_recorded_when_asked_for():
    engine = ToyEngine()
    output = Generation(engine, Oracle(engine), request(), Fixed(4), margins=True).run()
    assert len(output.margins) == len(output.tokens)
    ordered = np.sort(engine.logits_after([1, 2, 3]))
    assert output.margins[0] == pytest.approx(ordered[-1] - ordered[-2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": ()}, "empty"),
        ({"prompt": (1,) * 64}, "64 tokens, but the model sees 64"),
        ({"prompt": (1, 11)}, "token 11 is outside the vocabulary of 11"),
        ({"prompt": (-1,)}, "token -1 is outside"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_absurd_requests_are_refused_in_a_sentence(options, said):
    asked = Request(**{"prompt": (1,), "max_new_tokens": 5, **options})
    with pytest.raises(RequestError, match=said):
        run(ToyEngine(), Root(), asked)


def test_hidden_states_go_to_the_drafters_that_need_them():
    states = np.arange(12, dtype=np.float32).reshape(6, 2)
    engine = SimpleNamespace(hidden=lambda: states)
    sessions = [
        SimpleNamespace(drafter=SimpleNamespace(needs_hidden=needs), hidden="old")
        for needs in (True, False, True, True)
    ]
    give_hidden(engine, sessions, [2, 1, 3, 0])
    assert sessions[0].hidden.tolist() == states[:2].tolist()
    assert sessions[1].hidden is None
    assert sessions[2].hidden.tolist() == states[3:].tolist()
    assert sessions[3].hidden is None, "no rows were run for it"


def test_hidden_states_are_left_alone_where_nobody_needs_them():
    session = SimpleNamespace(drafter=SimpleNamespace(needs_hidden=False), hidden="old")
    give_hidden(SimpleNamespace(), [session], [1])
    assert session.hidden == "old"


class Recorded(Root):
    def __init__(self):
        self.asked = []

    def propose(self, context, budget, min_path_prob=0.0):
        self.asked.append((budget, min_path_prob))
        return super().propose(context, budget)

    def forced_tree(self, context, budget):
        self.asked.append(("forced", budget))
        return super().propose(context, budget)


def test_a_session_asks_for_what_it_is_told_to():
    engine, drafter = ToyEngine(), Recorded()
    session = Session(engine, drafter, request(max_new_tokens=3))
    session.open()
    while session.missing:
        part = session.next_part(2)
        session.commit_part(part, engine.forward([(session.sequence, part)]))
    session.propose(5)
    session.propose(5, min_path_prob=0.25)
    assert session.room == 2
    session.propose(0, 7)
    session.propose(0)
    assert drafter.asked == [(5, 0.0), (5, 0.25), ("forced", 2)]
    session.close()
    assert engine.opened == 0


def test_a_session_without_room_does_not_draft():
    engine, drafter = ToyEngine(), Recorded()
    session = Session(engine, drafter, request(max_new_tokens=1))
    session.open()
    while session.missing:
        part = session.next_part()
        session.commit_part(part, engine.forward([(session.sequence, part)]))
    assert session.room == 0
    assert len(session.propose(5, 5)) == 1
    assert drafter.asked == []
    session.close()


@pytest.mark.parametrize("prompt", [(), (1,) * 512, (11,), (-1,)])
def test_prompts_that_no_engine_runs_are_refused(prompt):
    with pytest.raises(RequestError, match=r"empty|shorten|outside"):
        Session(ToyEngine(), Root(), Request(prompt, 5))


def test_the_last_token_of_a_pass_brings_all_the_rest_of_the_text():
    session = Session(ToyEngine(), Recorded(), request(max_new_tokens=3), TextStream(Bytes()))
    tree = TokenTree.chain([3, 97, 98])
    assert session.accept(tree, WalkResult([0, 1], [97, 98], [0.5, 0.25])) == ["", ""]
    assert not session.done
    assert session.output.accepted == {"plain": 1}
    assert session.output.margins == []
    assert session.accept(tree, WalkResult([0, 1, 2], [99, 100, 101], [1.0, 1.0, 1.0])) == [
        "",
        "",
        "abcde",
    ]
    assert session.done
    assert session.output.text == "abcde"
    assert session.output.finish == "length"


class Watcher(Root):
    """Records how many successors of each node it is shown."""

    def __init__(self, top_k):
        self.top_k, self.shapes = top_k, []

    def observe(self, step):
        self.shapes.append((step.top_tokens.shape[1], float(step.top_probs.sum(1).max())))


@pytest.mark.parametrize(("top_k", "shown"), [(3, 3), (11, 11), (12, 11), (500, 11)])
def test_a_drafter_sees_its_top_k_and_no_more_than_the_vocabulary(top_k, shown):
    watcher = Watcher(top_k)
    run(ToyEngine(vocab_size=11), watcher, request(max_new_tokens=5), budget=2)
    assert {k for k, _ in watcher.shapes} == {shown}
    if shown == 11:  # all tokens are there, so their probabilities sum to 1
        assert all(abs(total - 1) < 1e-5 for _, total in watcher.shapes)


class Watched(Oracle):
    """Notes after how many of the engine's passes it is asked for something."""

    def __init__(self, engine):
        super().__init__(engine)
        self.learns_from_prompt, self.calls, self.passes = False, [], 0

    def read_prompt(self):
        self.calls.append(("read", self.passes))

    def propose(self, context, budget, min_path_prob=0.0):
        self.calls.append(("propose", self.passes))
        return super().propose(context, budget, min_path_prob)


class Paced(ToyEngine):
    """Counts its passes at a drafter."""

    def forward(self, batch, rows="all", view=None):
        self.watched.passes += 1
        return super().forward(batch, rows, view)


@pytest.mark.parametrize("adaptive", [True, False])
def test_no_drafter_delays_the_first_token_of_an_adaptive_budget(adaptive):
    engine = Paced()
    engine.watched = drafter = Watched(ToyEngine())
    budget = Governor(Cost((1, 2, 64), (1.0, 1.0, 1.0))) if adaptive else Fixed(8)
    output = Generation(engine, drafter, request(max_new_tokens=30), budget).run()
    assert output.tokens == run(ToyEngine(), Root(), request(max_new_tokens=30)).tokens
    first = 2 if adaptive else 1  # the prompt, and the pass of the first token
    assert drafter.calls[:2] == [("read", first), ("propose", first)]
    assert [call for call, _ in drafter.calls].count("read") == 1


def test_a_drafter_that_never_drafts_reads_nothing():
    engine = Paced()
    engine.watched = drafter = Watched(ToyEngine())
    for budget in (Governor(Cost((1, 2), (1.0, 5.0))), Fixed(0)):
        Generation(engine, drafter, request(), budget).run()
    assert not drafter.calls

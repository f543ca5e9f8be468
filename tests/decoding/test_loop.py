import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.control.temperature import Temperature
from paceline.core import Request, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.text_stream import TextStream
from paceline.drafters.base import Drafter
from paceline.errors import RequestError
from tests.decoding.test_text_stream import Letters
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

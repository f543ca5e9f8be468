import numpy as np
import pytest

from paceline.core import Exactness, Request
from paceline.decoding.governor import Fixed
from paceline.decoding.lenient import lenient_walk
from paceline.decoding.loop import Generation
from paceline.errors import MethodError
from paceline.registry import drafters
from tests.drafters.test_model import drafting, request_at, run
from tests.test_core import tree
from tests.toy import ToyEngine


def lenient(rollback):
    drafter = drafting(width=1)
    drafter.rollback = rollback
    return drafter


def surprise(tokens, prompt=(1, 2, 3)):
    """Share of tokens that are not the toy's first choice, and its largest surprise, in nats."""
    text, found, other = list(prompt), [], 0
    for token in tokens:
        row = ToyEngine().logits_after(text).astype(np.float64)
        found.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[token])
        other += token != row.argmax()
        text.append(token)
    return other / len(tokens), max(found)


def test_leniency_saves_passes_and_takes_second_choices():
    passes, shares = [], []
    for rollback in (None, 2.0, 6.0):
        drafter, count, others = lenient(rollback), 0, []
        for first in range(8):
            prompt = (first, 2, 3)
            output = run(drafter, request_at(0.0, prompt=prompt))
            share, most = surprise(output.tokens, prompt)
            assert rollback is None or most <= max(rollback, np.log(11))
            count, others = count + output.passes, [*others, share]
        passes.append(count)
        shares.append(np.mean(others))
    assert passes[0] > passes[1] > passes[2]
    assert 0 == shares[0] < shares[1] < shares[2]


def test_without_any_leniency_it_is_exact():
    for temperature in (0.0, 1.0):
        assert (
            run(lenient(-1.0), request_at(temperature)).tokens
            == run(drafting(), request_at(temperature)).tokens
        )


def test_the_drawn_token_goes_before_a_guess_that_would_do():
    guesses = tree([0, 1, 2], [-1, 0, 0])
    rows = np.zeros((3, 5), np.float32)
    rows[0, 2] = 0.5
    walked = lenient_walk(guesses, rows, [0], Request((1,), 9), 9.0)
    assert walked.path == [0, 2]
    rows[0, 3] = 0.6
    walked = lenient_walk(guesses, rows, [0], Request((1,), 9), 9.0)
    assert walked.drawn[0] in (1, 2)
    walked = lenient_walk(guesses, rows, [0], Request((1,), 9), 0.1)
    assert (walked.path, walked.drawn) == ([0], [3])


def test_it_is_registered_as_lossy_and_wrong_settings_are_refused():
    assert drafters.methods()["bild"].exactness is Exactness.LOSSY
    for text in ("bild:path=a,rollback=-1", "bild:path=a,rollback=nan"):
        with pytest.raises(MethodError, match="bild:rollback"):
            drafters.parse(text)
    asked = Request((1,), 9, 1.0, walk="rejection")
    with pytest.raises(MethodError, match="rejection walk"):
        Generation(ToyEngine(), lenient(1.0), asked, Fixed(4))

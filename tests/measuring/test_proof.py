import json

import numpy as np
import pytest

from paceline.core import Output, Request
from paceline.decoding.governor import Fixed
from paceline.errors import RequestError
from paceline.measuring.baseline import TurnOptions, decode, plain_drafter, plain_turns
from paceline.measuring.prompts import Dialogue
from paceline.measuring.proof import compare, prove
from paceline.measuring.report.document import proof_document
from tests.measuring.toy_lm import Broken, Knowing, ToyLM
from tests.toy import ToyEngine

DIALOGUES = [Dialogue(("Once upon",), "text", 1), Dialogue(("One", "Two"), "qa", 3)]


def run(lm, temperatures=(0.0, 0.7), dialogues=DIALOGUES, length=12):
    return prove(
        lm,
        {"oracle": Knowing(lm.engine)},
        dialogues,
        temperatures,
        TurnOptions(length),
        lambda: Fixed(8),
    )


def test_a_right_engine_has_no_bug():
    lm = ToyLM()
    proof = run(lm)
    found = proof_document(proof)
    counts = [found[key] for key in ("pairs", "identical", "ties", "bugs", "first", "clipped")]
    assert counts == [6, 6, 0, 0, None, 0]
    tally = proof.drafters["oracle"]
    assert tally.tokens == 6 * 12
    assert tally.passes < tally.tokens
    assert lm.engine.opened == 0


def test_a_planted_bug_is_found_where_it_is():
    prompt = len("Once upon")
    engine = Broken(length=prompt + 5, nudge=9.0)
    proof = run(ToyLM(engine), temperatures=(0.0,), dialogues=DIALOGUES[:1])
    at = proof.first.difference
    assert (proof.total("bugs"), proof.total("ties"), proof.total("identical")) == (1, 0, 0)
    assert at.position == 5
    (turn,) = plain_turns(ToyLM(), DIALOGUES[:1], TurnOptions(12))
    logits = engine.logits_after([*turn.request.prompt, *turn.plain.tokens[:5]])
    second, first = np.argsort(logits)[-2:]
    assert (at.expected, at.found) == (first, second)
    assert at.margin == pytest.approx(logits[first] - logits[second])
    assert at.verdict == "bug"
    assert "oracle at temperature 0, line 1, new token 5" in str(proof.first)
    json.dumps(proof_document(proof), allow_nan=False)


@pytest.mark.parametrize(
    ("invariant", "tolerance", "verdict"),
    [(False, 100.0, "tie"), (False, 1e-6, "bug"), (True, 100.0, "bug")],
)
def test_a_near_draw_is_a_tie_only_where_rounding_is_allowed(invariant, tolerance, verdict):
    engine = Broken(length=len("Once upon") + 5, nudge=9.0)
    engine.invariant, engine.tolerance = invariant, tolerance
    proof = run(ToyLM(engine), temperatures=(0.0,), dialogues=DIALOGUES[:1])
    assert proof.first.difference.verdict == verdict


def test_the_tolerance_is_in_logits_and_scores_are_over_the_temperature():
    engine = ToyEngine()
    engine.invariant, engine.tolerance = False, 0.1
    plain, other = Output([1, 2], margins=[1.0, 0.15]), Output([1, 3])
    cold, warm = Request((1, 2), 4), Request((1, 2), 4, temperature=0.5)
    assert compare(ToyLM(engine), cold, plain, other).verdict == "bug"
    assert compare(ToyLM(engine), warm, plain, other).verdict == "tie"
    assert compare(ToyLM(engine), warm, plain, other).tolerance == 0.2


class WorseOfTwo:
    """Keeps the two best tokens and prefers the second, by far."""

    def apply(self, logits, history):
        best, second = np.argsort(logits)[:-3:-1]
        edited = np.full_like(logits, -np.inf)
        edited[best], edited[second] = 0.0, 1000.0
        return edited


@pytest.mark.parametrize(("share", "verdict"), [(1.01, "tie"), (0.99, "bug")])
def test_a_token_that_rounding_takes_past_a_cut_is_a_tie(share, verdict):
    lm = ToyLM()
    request = Request((1, 2, 3), 6, controls=(WorseOfTwo(),))
    plain = decode(lm, plain_drafter(lm), request, Fixed(0), margins=True)
    said = plain.tokens[:4]
    logits = lm.engine.logits_after([*request.prompt, *said])
    third, second = np.argsort(logits)[-3:-1]
    assert plain.tokens[4] == second
    assert plain.margins[4] == 1000
    other = Output([*said, int(third)])
    assert compare(lm, request, plain, other).verdict == "bug"
    lm.engine.invariant = False
    lm.engine.tolerance = share * float(logits[second] - logits[third])
    assert compare(lm, request, plain, other).verdict == verdict


def test_an_output_that_ends_elsewhere_is_a_bug():
    engine = ToyEngine()
    engine.invariant, engine.tolerance = False, 100.0
    long, short = Output([1, 2], margins=[0.0, 0.0]), Output([1], margins=[0.0])
    lm, request = ToyLM(engine), Request((1, 2), 4)
    early, late = compare(lm, request, long, short), compare(lm, request, short, long)
    assert (early.expected, early.found, early.verdict) == (2, None, "bug")
    assert (late.expected, late.found, late.margin, late.verdict) == (None, 2, None, "bug")
    same = Output([1], finish="stop")
    assert compare(lm, request, short, same).verdict == "bug"
    assert compare(lm, request, short, Output([1])) is None


def test_later_turns_are_asked_after_the_plain_answers():
    lm = ToyLM()
    one, two = plain_turns(lm, DIALOGUES[1:], TurnOptions(4, seed=7))
    text = "\n".join(["One", lm.tokenizer.decode(one.plain.tokens), "Two"])
    assert two.request.prompt == tuple(lm.tokenizer.encode(text))
    assert [one.request.seed, two.request.seed] == [7, 8]
    assert [one.name, two.name] == ["line 3 turn 1", "line 3 turn 2"]


def test_long_prompts_keep_their_last_tokens_and_are_counted():
    lm = ToyLM(ToyEngine(context=20))
    proof = run(
        lm, temperatures=(0.0,), length=8, dialogues=[Dialogue(("x" * 50 + "yz",), "text", 1)]
    )
    assert proof.clipped == 1
    (turn,) = plain_turns(lm, [Dialogue(("x" * 50 + "yz",), "text", 1)], TurnOptions(8))
    assert turn.request.prompt == tuple(lm.tokenizer.encode("x" * 10 + "yz"))
    assert len(turn.plain.tokens) == 8


@pytest.mark.parametrize("length", [0, 64, 10**12])
def test_an_answer_that_leaves_no_room_is_refused(length):
    with pytest.raises(RequestError, match="expected 1 to 63"):
        list(plain_turns(ToyLM(), DIALOGUES, TurnOptions(length)))


def test_an_interrupt_ends_the_proof():
    class Impatient(ToyEngine):
        def forward(self, batch, rows="all"):
            if self.opened and batch[0][0].length > 12:
                raise KeyboardInterrupt
            return super().forward(batch, rows)

    with pytest.raises(KeyboardInterrupt):
        run(ToyLM(Impatient()))

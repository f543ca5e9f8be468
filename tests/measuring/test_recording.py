import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.decoding.governor import Fixed
from paceline.measuring.baseline import TurnOptions, decode, plain_turns
from paceline.measuring.prompts import Dialogue
from paceline.measuring.recording import RecordingBudget, recording_budget, trace
from paceline.models.detokenize import Detokenizer
from tests.measuring.toy_lm import Letters, ToyLM
from tests.toy import Oracle


@given(st.integers(0, 12), st.integers(1, 20), st.sampled_from([RecordingBudget, recording_budget]))
def test_every_token_of_an_answer_is_traced_to_its_guess(budget, length, watch):
    lm = ToyLM()
    asking = TurnOptions(length, ignore_eos=True)
    (turn,) = plain_turns(lm, [Dialogue(("Once",), "text", 1)], asking)
    seen = watch(Fixed(budget))
    output = decode(lm, Oracle(lm.engine), turn.request, seen)
    assert len(seen.passes) == output.passes
    found = trace(seen.passes, output.tokens, ("oracle",), Detokenizer(lm.tokenizer))
    assert len(found) == length
    assert "".join(token.text for token in found) == turn.plain.text
    guessed = [token for token in found if token.origin]
    assert len(guessed) == output.accepted.get("oracle", 0)
    assert all((token.score, token.origin) == (0.5, "oracle") for token in guessed)
    for number in range(1, output.passes + 1):
        mine = [token for token in found if token.number == number]
        assert [token.depth for token in mine] == [*range(1, len(mine)), 0]
        assert {token.nodes for token in mine} == {len(seen.passes[number - 1][0])}


def test_tokens_that_stop_inside_a_pass_end_the_trace():
    tree = TokenTree.chain(np.arange(4), score=0.9)
    found = trace([(tree, [0, 1, 2, 3])], [1, 2], ("a",), Detokenizer(Letters()))
    assert [(token.text, token.depth) for token in found] == [("b", 1), ("c", 2)]

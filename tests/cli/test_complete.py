import numpy as np
import pytest

from paceline import LM
from paceline.core import TokenTree
from tests.conftest import shared

METHODS = ("beam", "superposed")
MODEL = str(shared("models", "stories260K"))


@pytest.mark.parametrize("method", METHODS)
def test_completions_come_likeliest_first(paceline, method):
    words = ("complete", "Once upon", "--model", MODEL, "-n", 4, "--method", method)
    found = paceline(*words, "--json").json
    assert found["lossy"]
    assert found["method"] == method
    scores = [one["score"] for one in found["completions"]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert all(len(one["tokens"]) == 10 and one["text"] for one in found["completions"])
    plain = paceline(*words)
    assert len(plain.out.splitlines()) == 4
    assert repr(found["completions"][0]["text"]) in plain.out
    assert "lossy" in plain.err


@pytest.mark.parametrize("method", METHODS)
def test_one_completion_is_what_generate_writes(method):
    lm = LM(MODEL, drafter="plain")
    (one,) = lm.complete("Once upon", 1, max_new_tokens=12, method=method)
    output = lm.generate("Once upon", max_new_tokens=12, temperature=0.0)
    assert one.text == output.text
    assert list(one.tokens) == output.tokens


def test_scores_are_the_models_and_beams_are_no_worse():
    lm = LM(MODEL, drafter="plain")
    found = lm.complete("Once upon", 3)
    ids = lm.tokenizer.encode("Once upon")
    for one in found:
        sequence = lm.engine.start(np.array(ids[:-1], np.int32))
        logits = lm.engine.forward([(sequence, TokenTree.chain([ids[-1], *one.tokens[:-1]]))])
        logs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
        assert one.score == pytest.approx(sum(logs[range(len(one.tokens)), one.tokens]), abs=1e-3)
        lm.engine.release(sequence)
    assert found[0].score > lm.complete("Once upon", 3, method="superposed")[0].score - 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "600"], "continuations of 600 tokens are requested"),
        (["-n", "65"], "less than or equal to 64"),
        (["--alpha", "2"], "alpha"),
        (["--alpha", "0.5"], "beam search uses no n-grams"),
        (["--method", "beams"], "expected beam or superposed"),
        (
            ["--model", f"{MODEL}|{MODEL}"],
            f"--model is '{MODEL}' and '{MODEL}|{MODEL}'; give one",
        ),
    ],
)
def test_what_cannot_be_is_refused(paceline, words, said):
    done = paceline("complete", "Once upon", "--model", MODEL, *words)
    assert done.code == 2
    assert said in done.err

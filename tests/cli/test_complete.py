import pytest

from paceline import LM
from tests.conftest import shared

MODEL = str(shared("models", "stories260K"))


def test_completions_come_likeliest_first(paceline):
    found = paceline("complete", "Once upon", "--model", MODEL, "-n", 4, "--json").json
    assert found["lossy"]
    scores = [one["score"] for one in found["completions"]]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert all(len(one["tokens"]) == 10 and one["text"] for one in found["completions"])
    plain = paceline("complete", "Once upon", "--model", MODEL, "-n", 4)
    assert len(plain.out.splitlines()) == 4
    assert repr(found["completions"][0]["text"]) in plain.out
    assert "lossy" in plain.err


def test_one_completion_is_what_generate_writes():
    lm = LM(MODEL, drafter="plain")
    (one,) = lm.complete("Once upon", 1, max_new_tokens=12)
    output = lm.generate("Once upon", max_new_tokens=12, temperature=0.0)
    assert one.text == output.text
    assert list(one.tokens) == output.tokens


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "600"], "continuations of 600 tokens are asked for"),
        (["-n", "65"], "less than or equal to 64"),
        (["--alpha", "2"], "alpha"),
        (["--model", f"{MODEL}|{MODEL}"], "ensemble cannot; use native or reference"),
    ],
)
def test_what_cannot_be_is_refused(paceline, words, said):
    done = paceline("complete", "Once upon", "--model", MODEL, *words)
    assert done.code == 2
    assert said in done.err

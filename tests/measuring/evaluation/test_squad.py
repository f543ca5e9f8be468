"""SQuAD among distractors: the asked paragraph is in the context, and bad files are refused."""

import gzip
import json

import pytest

from paceline.errors import RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.run import evaluate
from paceline.measuring.evaluation.squad import Squad, read_paragraphs
from paceline.scoring import score_tokens
from tests.conftest import shared


def article(name, count):
    def paragraph(i):
        text = f"{name} has a cat. The cat of {name} is {i} days old."
        asked = [
            {"question": f"How old is it, {name}?", "answers": [{"text": f"{i} days"}]},
            {"question": "Who?", "answers": []},
        ]
        return {"context": text, "qas": asked}

    return {"paragraphs": [paragraph(i) for i in range(count)]}


DOCUMENT = {"data": [article(name, 6) for name in ("Ann", "Ben", "Tim")]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "xquad.json").write_text(json.dumps(DOCUMENT))
    return tmp_path


@pytest.fixture(scope="module")
def lm():
    return LM(shared("models", "stories260K"), drafter="plain", budget=1)


def test_contexts_hold_the_paragraph_among_those_of_other_articles(lm, folder):
    suite = Squad(folder, limit=5, length=120)
    for item in suite.items:
        context = suite.context(lm, item)
        text = lm.tokenizer.decode(context.tokens)
        gold = suite._paragraphs[item.content]
        assert 60 < len(context.tokens) <= 120
        assert gold.text in text
        asked = lm.tokenizer.decode(context.questions[0].tokens)
        assert asked.count("Question: ") == 3
        assert asked.endswith(gold.asked[0][1])
        assert len(context.questions) == 1
        others = [each for each in suite._paragraphs if each.text in text and each != gold]
        assert others
        assert gold.article not in {each.article for each in others}
        assert suite.context(lm, item) == context
    assert len({item.content for item in suite.items}) == 5


def test_scores_are_those_of_the_whole_text(lm, folder):
    suite = Squad(folder, limit=1, length=100)
    [result] = evaluate(suite, lm).results
    context = suite.context(lm, suite.items[0])
    [question] = context.questions
    logprobs = score_tokens(lm.engine, [*context.tokens, *question.tokens]).logprobs
    assert result["nats"] == pytest.approx(-sum(logprobs[-question.answer :]), abs=1e-6)
    assert result["tokens"] == question.answer
    assert result["questions"] == 1


def test_a_compressed_file_is_read_and_the_real_one_has_its_numbers(folder):
    packed = folder / "squad.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(DOCUMENT).encode()))
    assert read_paragraphs(packed) == read_paragraphs(folder / "xquad.json")
    real = read_paragraphs(shared("data", "xquad-en", "xquad.en.json.gz"))
    assert (len(real), sum(len(each.asked) for each in real)) == (240, 1190)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no whole JSON file"),
        ("[]", "not in SQuAD's format"),
        ('{"data": [{"paragraphs": [{"context": 1}]}]}', "not in SQuAD's format"),
        ('{"data": []}', "no paragraph with answered questions"),
        (json.dumps({"data": DOCUMENT["data"][:1]}), "one article, expected at least two"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, text, told):
    (tmp_path / "squad.json").write_text(text)
    with pytest.raises(RequestError, match=told):
        Squad(tmp_path)


def test_a_context_that_is_too_small_is_refused(lm, folder):
    with pytest.raises(RequestError, match="give a larger --context"):
        evaluate(Squad(folder, length=10), lm)
    with pytest.raises(RequestError, match="--context is 300, and with 384 tokens"):
        evaluate(Squad(folder, length=300), lm)

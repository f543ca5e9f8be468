"""Long contexts: what is hidden is there, and a policy is scored as requests run it."""

import json
import lzma

import numpy as np
import pytest

from paceline.core import TokenTree
from paceline.errors import RequestError
from paceline.kvcache.base import parse_policy
from paceline.lm import LM
from paceline.measuring.evaluation.data import read_rows
from paceline.measuring.evaluation.forest import Branches, score_branches
from paceline.measuring.evaluation.long_context import KINDS, LongContexts
from paceline.measuring.evaluation.long_tasks import ContextBuilder
from paceline.measuring.evaluation.plan import SuiteSettings
from paceline.measuring.evaluation.run import evaluate, group_summary
from paceline.scoring import score_tokens
from tests.conftest import shared

BOOK = "\n".join(
    f'Once {i} birds sat in a tree. "What a day!" said number {i % 7}. They sang.'
    for i in range(600)
)


@pytest.fixture(scope="module")
def model():
    return shared("models", "stories260K")


@pytest.fixture(scope="module")
def lm(model):
    return LM(model, drafter="plain", budget=1)


@pytest.fixture
def books(tmp_path):
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": BOOK}) + "\n")
    return tmp_path


def built(lm, kind, length=384, seed=0):
    encode = lm.tokenizer.encode
    builder = ContextBuilder(lambda text: encode(text, False), encode("")[:1], length)
    return getattr(builder, kind)(BOOK, np.random.default_rng(seed))


def fact(lm, question):
    """The sentence that a context hides for a question."""
    asked, answer = (
        lm.tokenizer.decode(part).strip()
        for part in (question.tokens[1 : -question.answer], question.tokens[-question.answer :])
    )
    return f"{asked.rpartition('Answer: ')[2].strip()} {answer}."


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_have_their_length_and_hold_the_answers(lm, kind):
    context = built(lm, kind)
    assert len(context.tokens) == 384
    assert len({question.tokens[0] for question in context.questions}) == 1
    text = lm.tokenizer.decode(context.tokens)
    for question in context.questions:
        passage = question.tokens[1:]
        if kind == "copy":
            places = range(len(context.tokens) - len(passage) + 1)
            assert any(context.tokens[at : at + len(passage)] == passage for at in places)
            continue
        assert fact(lm, question) in text
    assert built(lm, kind) == context
    assert built(lm, kind, seed=1) != context


def test_needles_are_spread_over_the_context_and_not_at_its_end(lm):
    context = built(lm, "multikey", 448)
    text = lm.tokenizer.decode(context.tokens)
    places = [text.find(" is ", at) for at in range(len(text)) if text.startswith("favourite", at)]
    assert len(places) == 8
    assert places == sorted(places)
    ends = lm.tokenizer.decode(context.tokens[-40:])
    assert "favourite" not in ends


def test_a_long_sentence_pushes_no_needle_out(lm):
    encode = lm.tokenizer.encode
    text = BOOK[:200] + " and a bird" * 400 + "."
    builder = ContextBuilder(lambda part: encode(part, False), [], 448)
    context = builder.single(text, np.random.default_rng(0))
    assert len(context.tokens) == 448
    found = lm.tokenizer.decode(context.tokens)
    assert all(fact(lm, question) in found for question in context.questions)
    characters = ContextBuilder(list, [], 400)
    with pytest.raises(RequestError, match="too short for what is hidden in it"):
        characters.multikey("a" * 1000, np.random.default_rng(0))


def test_scores_are_those_of_the_whole_text(lm, books):
    suite = LongContexts(books, limit=1, length=384)
    [result] = evaluate(suite, lm).results[:1]
    context = built_by(suite, lm)
    nats = full_gain = 0.0
    for question in context.questions:
        tokens = [*context.tokens, *question.tokens]
        logprobs = score_tokens(lm.engine, tokens).logprobs[-question.answer :]
        alone = score_tokens(lm.engine, [*lm.tokenizer.encode("")[:1], *question.tokens])
        nats -= sum(logprobs)
        full_gain += sum(logprobs) - sum(alone.logprobs[-question.answer :])
    assert result["nats"] == pytest.approx(nats, abs=1e-6)
    assert result["whole_gain"] == result["gain"] == pytest.approx(full_gain, abs=1e-6)
    assert result["questions"] == 4


def built_by(suite, lm):
    """The first context of a suite, drawn as the suite draws it."""
    rng = np.random.default_rng([0, 0, 0])
    text = suite._excerpt(lm, rng)
    encode = lm.tokenizer.encode
    return ContextBuilder(lambda part: encode(part, False), encode("")[:1], 384).single(text, rng)


def test_a_policy_that_keeps_all_keeps_the_gain_and_one_that_keeps_little_changes_it(model, books):
    roomy = LM(model, drafter="plain", budget=1, kv_policy="sliding_window:budget=512")
    suite = LongContexts(books, limit=1, length=384)
    found = evaluate(suite, roomy)
    kept = group_summary(suite, found.results)
    assert {name: group["metrics"]["gain kept"]["value"] for name, group in kept.items()} == {
        "single": 1.0,
        "multikey": 1.0,
        "copy": 1.0,
    }
    assert found.settings["kv_policy"] == {
        "name": "sliding_window",
        "budget": 512,
        "sinks": 4,
        "every": 64,
    }
    tight = LM(model, drafter="plain", budget=1, kv_policy="sliding_window:budget=64")
    other = evaluate(suite, tight).results
    assert all(a["gain"] != b["gain"] for a, b in zip(found.results, other, strict=True))
    assert [a["whole_gain"] for a in found.results] == [b["whole_gain"] for b in other]


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_what_an_attention_pattern_reads_is_set_beside_reading_all(model, books, engine):
    suite = LongContexts(books, limit=1, length=384)
    dense = evaluate(suite, LM(model, drafter="plain", budget=1, engine=engine)).results
    for share, same in ((1.0, True), (0.1, False)):
        pattern = f"quest:share={share},least=16,local=32,dense=0"
        lm = LM(model, drafter="plain", budget=1, engine=engine, attention=pattern)
        found = evaluate(suite, lm).results
        for ours, full in zip(found, dense, strict=True):
            assert ours["whole_gain"] == pytest.approx(full["gain"], abs=1e-4)
            assert (ours["gain"] == pytest.approx(full["gain"], abs=1e-4)) == same


def test_what_a_sparse_prefill_leaves_is_set_beside_reading_all(model, books):
    suite = LongContexts(books, limit=1, length=384)
    dense = evaluate(suite, LM(model, drafter="plain", budget=1)).results
    for threshold, same in ((1.0, True), (0.0, False)):
        pattern = f"block_sparse:threshold={threshold},local=1"
        found = evaluate(suite, LM(model, drafter="plain", budget=1, attention=pattern)).results
        for ours, full in zip(found, dense, strict=True):
            assert ours["whole_gain"] == pytest.approx(full["gain"], abs=1e-4)
            assert (ours["gain"] == pytest.approx(full["gain"], abs=1e-4)) == same


@pytest.mark.parametrize("name", ["h2o:budget=48,recent=16,every=32", "sliding_window:budget=40"])
def test_forests_under_a_policy_are_what_single_tokens_give(lm, name):
    policy = parse_policy(name)
    rng = np.random.default_rng(0)
    size = lm.engine.config.vocab_size
    context, answer = rng.integers(3, size, 193).tolist(), rng.integers(3, size, 5).tolist()
    sequence = lm.engine.open()
    policy.begin(lm.engine, sequence)
    for token in context[:-1]:
        lm.engine.forward([(sequence, TokenTree.root(token))], "none")
        lm.engine.commit(sequence, [0])
        policy.act(lm.engine, sequence)
    rows = lm.engine.forward([(sequence, TokenTree.chain([context[-1], *answer]))])
    shifted = rows - rows.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = logprobs[np.arange(5), answer]
    lm.engine.release(sequence)
    [[score, whole]] = score_branches(lm.engine, [Branches(context, [answer, answer[:2]])], policy)
    assert score.logprobs == pytest.approx(expected, abs=1e-5)
    assert whole.logprobs == pytest.approx(expected[:2], abs=1e-5)
    assert score.last(2).logprob == pytest.approx(expected[-2:].sum(), abs=1e-5)


def test_contexts_that_cannot_be_built_are_refused(lm, tmp_path, books):
    with pytest.raises(RequestError, match="--context is 500, and with 128 tokens"):
        evaluate(LongContexts(books, length=500), lm)
    with pytest.raises(RequestError, match="too short for the suite long, expected 384"):
        evaluate(LongContexts(books, length=100), lm)
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "Too short."}) + "\n")
    with pytest.raises(RequestError, match="no text of 20000 characters"):
        LongContexts(tmp_path)


def test_policies_are_refused_with_suites_that_they_do_not_act_on(tmp_path):
    for settings in (SuiteSettings(suite=["long", "blimp"]), SuiteSettings(text=[tmp_path])):
        with pytest.raises(
            RequestError, match="a KV policy acts in --suite babilong, gsm8k, long, mbpp, squad"
        ):
            settings.check_policy()
    SuiteSettings(suite=["long", "gsm8k"]).check_policy()
    with pytest.raises(RequestError, match="--context is of --suite babilong or long or squad"):
        SuiteSettings(suite=["blimp"], context=512, data=tmp_path).check()


def test_data_may_be_compressed_by_xz(tmp_path):
    path = tmp_path / "long.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "a"}\n'))
    assert list(read_rows(path, {})) == [{"text": "a"}]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RequestError, match=r"no whole \.xz file"):
        list(read_rows(path, {}))

"""BLiMP, LAMBADA and texts: against accuracies and losses that were computed by hand."""

import json
import math

import numpy as np
import pytest

from paceline.errors import ModelError, RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.blimp import Blimp
from paceline.measuring.evaluation.forest import Branches, score_branches
from paceline.measuring.evaluation.lambada import Lambada, split_last_word
from paceline.measuring.evaluation.run import comparison, evaluate, group_summary, summary
from paceline.measuring.evaluation.texts import TextDocuments, TextWindows
from paceline.measuring.perplexity import predict
from paceline.scoring import score_tokens
from tests.conftest import shared
from tests.measuring.evaluation.scripted import bigram_lm


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(good, bad, paradigm="agreement"):
    return {"sentence_good": good, "sentence_bad": bad, "UID": paradigm}


@pytest.fixture
def pairs(tmp_path):
    write(
        tmp_path / "blimp.jsonl",
        [
            pair("the cat sleeps", "the cat sleep"),
            pair("the cats sleep", "the cats sleeps"),
            pair("the dog barks", "the dog sleep"),
            pair("the cat", "dog cat", "order"),
        ],
    )
    return tmp_path


def test_accuracy_of_pairs_is_what_the_table_says(pairs):
    # 0.65 against 0.05; 1/8 on both sides, which is no win; 0.02 against 0.14; 1/8 against 0.14.
    lm = bigram_lm(cat_sleeps=0.65, dog_barks=0.02)
    suite = Blimp(pairs)
    found = evaluate(suite, lm)
    assert [result["correct"] for result in found.results] == [1, 0, 0, 0]
    nats = [math.log(0.65 / 0.05), 0, math.log(0.02 / 0.14), math.log(0.125 / 0.14)]
    assert [result["nats"] for result in found.results] == pytest.approx(nats, abs=1e-6)
    accuracy = summary(suite, found.results)["accuracy"]
    assert accuracy == {"value": 0.25, "error": pytest.approx(math.sqrt(0.25 * 0.75 / 4))}
    groups = group_summary(suite, found.results)
    assert {name: group["items"] for name, group in groups.items()} == {"agreement": 3, "order": 1}
    assert found.settings == {"prefix": "<s>"}
    assert lm.engine.passes <= 2


def test_the_prefix_token_decides_about_first_words(pairs):
    lm = bigram_lm(**{"<s>_the": 0.5})
    with_prefix = evaluate(Blimp(pairs), lm).results[3]
    assert with_prefix == {"correct": 1, "nats": pytest.approx(math.log(0.5 * 14), abs=1e-6)}
    without = evaluate(Blimp(pairs, prefix="none"), lm)
    assert without.results[3]["correct"] == 0  # the first word is not scored
    assert without.settings == {"prefix": "none"}
    other = evaluate(Blimp(pairs, prefix="dog"), bigram_lm(dog_the=0.9))
    assert other.settings == {"prefix": "dog"}
    assert other.results[3]["correct"] == 1
    with pytest.raises(RequestError, match="no token '<nothing>'"):
        evaluate(Blimp(pairs, prefix="<nothing>"), lm)


def test_limits_hold_for_each_paradigm(pairs):
    assert [item.group for item in Blimp(pairs, 1).items] == ["agreement", "order"]


def test_last_words(tmp_path):
    write(tmp_path / "lambada_test.jsonl", [{"text": "the cat sleeps"}, {"text": "the dog barks"}])
    lm = bigram_lm(cat_sleeps=0.65, dog_barks=0.02)
    suite = Lambada(tmp_path)
    found = evaluate(suite, lm)
    nats = [-math.log(0.65), -math.log(0.02)]
    assert [each["nats"] for each in found.results] == pytest.approx(nats, abs=1e-6)
    assert [each["correct"] for each in found.results] == [1, 0]
    assert summary(suite, found.results)["nats of the last word"]["value"] == pytest.approx(
        sum(nats) / 2
    )
    write(tmp_path / "lambada_test.jsonl", [{"text": "word"}])
    with pytest.raises(RequestError, match="'word' as 'text'"):
        Lambada(tmp_path)


def test_long_passages_are_cut_on_the_left(tmp_path):
    write(tmp_path / "lambada.jsonl", [{"text": "the dog " * 40 + "cat sleeps"}])
    lm = bigram_lm(context=8, cat_sleeps=0.65)
    [result] = evaluate(Lambada(tmp_path), lm).results
    assert result["nats"] == pytest.approx(-math.log(0.65), abs=1e-6)


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_forests_have_the_scores_of_whole_texts(name):
    lm = LM(shared("models", name), drafter="plain", budget=1)
    rng = np.random.default_rng(0)
    size = lm.engine.config.vocab_size

    def some(count):
        return rng.integers(3, size, count).tolist()

    groups = []
    for length in (1, 2, 70, 300, 5):
        start = some(3)
        groups.append(
            Branches(some(length), [[*start, *some(4)], [*start, *some(1)], start, [], some(1)])
        )
    found = score_branches(lm.engine, groups)
    for group, scores in zip(groups, found, strict=True):
        for continuation, score in zip(group.continuations, scores, strict=True):
            whole = score_tokens(lm.engine, [*group.context, *continuation])
            logprobs = whole.logprobs[len(group.context) :]
            assert score.logprob == pytest.approx(sum(logprobs), abs=1e-9)
    best = lm.generate("Once upon a time", max_new_tokens=6, temperature=0.0)
    ids = lm.encode("Once upon a time")
    [[greedy, not_greedy]] = score_branches(
        lm.engine, [Branches(ids, [list(best.tokens), [*best.tokens[:-1], 5]])]
    )
    assert greedy.greedy
    assert not not_greedy.greedy


def test_texts_that_do_not_fit_are_refused():
    lm = bigram_lm(context=4)
    for context, continuation in (([], [1]), ([1] * 4, [1, 2])):
        with pytest.raises(RequestError, match="expected 1 to 5"):
            score_branches(lm.engine, [Branches(context, [continuation])])
    assert score_branches(lm.engine, []) == []
    lm.engine.table[:] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        score_branches(lm.engine, [Branches([1], [[2]])])


def test_the_last_word_keeps_the_tokens_of_the_text():
    lm = LM(shared("models", "stories260K"), drafter="plain", budget=1)
    text = "Lily went to the park to play with her friend Tom"
    before, after = split_last_word(lm, text)
    assert [*before, *after] == lm.tokenizer.encode(text, False)
    assert lm.tokenizer.decode(after).strip() == "Tom"


def test_windows_of_a_text_are_those_of_compress():
    lm = LM(shared("models", "stories260K"), drafter="plain", budget=1)
    text = "One day, a girl named Lily found a needle in her room.\n" * 120
    suite = TextWindows("text", [text], lm.tokenizer, 128, 4)
    found = evaluate(suite, lm)
    metrics = summary(suite, found.results)
    ids = lm.tokenizer.encode(text)[1:]
    expected = predict(
        lm.engine,
        [(ids[i * 127 : (i + 1) * 127], found.results[i]["bytes"]) for i in range(4)],
        lm.tokenizer.encode("")[0],
        127,
    )
    assert metrics["nats a token"]["value"] == pytest.approx(expected.nats / expected.tokens)
    assert metrics["bits a byte"]["value"] == pytest.approx(expected.bits_per_byte)
    same = comparison(suite, found.results, found.results)
    assert same["equal_most_likely"] == 1
    nothing = {"difference": 0, "error": 0, "p": 1, "permutation_p": 1}
    assert same["metrics"]["nats a token"] == nothing
    rounded = LM(shared("models", "stories260K"), drafter="plain", budget=1, dtype="int4")
    worse = evaluate(suite, rounded)
    differences = comparison(suite, worse.results, found.results)
    nats, bits = (differences["metrics"][each] for each in ("nats a token", "bits a byte"))
    assert nats["difference"] == pytest.approx(
        np.mean([a["nats"] - b["nats"] for a, b in zip(worse.results, found.results, strict=True)])
    )
    assert nats["difference"] * bits["difference"] > 0
    assert 0.5 < differences["equal_most_likely"] < 1


def test_documents_are_compared_in_bytes():
    text = [f"Lily and Tom went to the park {i} times. They had fun.\n" for i in range(5)]
    suite = TextDocuments("text", text)
    results = []
    for name in ("stories260K", "TinyStories-656K"):
        lm = LM(shared("models", name), drafter="plain", budget=1)
        found = evaluate(suite, lm)
        [start] = lm.tokenizer.encode("")
        assert found.settings["prefix"] == lm.tokenizer.token(start)
        ids = lm.tokenizer.encode(text[0], False)
        expected = predict(lm.engine, [(ids, len(text[0]))], start, len(ids))
        assert found.results[0]["bits"] == pytest.approx(expected.nats / math.log(2))
        results.append(found.results)
    difference = comparison(suite, *results)["metrics"]["bits a byte"]
    total = [sum(result["bits"] for result in each) for each in results]
    assert difference["difference"] == pytest.approx(
        (total[0] - total[1]) / sum(len(each.encode()) for each in text)
    )
    with pytest.raises(RequestError, match="has 1 document"):
        TextDocuments("text", text[:1])
    with pytest.raises(RequestError, match="no token that begins"):
        evaluate(suite, bigram_lm(begins=False))

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from paceline.errors import MethodError, RequestError
from paceline.planning.sampling_search import (
    Example,
    SamplingSearch,
    SamplingSettings,
    SearchSpace,
    Trial,
    _slack,
    read_examples,
    reader,
    writer,
)
from paceline.planning.scorers import scorer
from tests.measuring.toy_lm import ToyLM

EXAMPLES = [Example(f"question {i}", str(i % 3)) for i in range(12)]


class Coins:
    """Answers of 30 tokens, nearly; the last that is asked for says how good it is.

    A warm answer is right once in a while, a cold one never: several warm ones pay.
    """

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, settings, seed):
        self.calls.append((prompt, settings, seed))
        key = [seed, len(prompt), int(prompt[-1]), int(settings.temperature * 1000)]
        rng = np.random.default_rng([*key, int(settings.top_p * 1000)])
        right = rng.random() < settings.temperature / 3
        return [7 if right and i == 9 else 1 for i in range(30)][: settings.max_new_tokens]


def economy(per_question=100, budget=20_000, write=None, **options):
    return SamplingSearch(
        EXAMPLES,
        write or Coins(),
        lambda tokens: "right" if 7 in tokens else "wrong",
        lambda text, answer: float(text == "right"),
        per_question,
        budget,
        **{"space": SearchSpace(n=(1, 8), tokens=(4, 32)), **options},
    )


def test_it_finds_settings_that_pay_and_keeps_both_budgets():
    search = economy()
    trials = list(search.run())
    best = search.best
    assert trials == search.trials
    assert best.score > 0.8 > trials[0].score
    assert best.settings.temperature > 0.5
    assert best.settings.max_new_tokens >= 10
    assert best.cost <= 100
    assert search.spent < 20_000 + 8 * 32
    assert {trial.verdict for trial in trials} >= {"whole", "expensive", "behind"}
    for trial in trials:
        largest = trial.settings.max_new_tokens * trial.settings.n
        assert trial.n <= trial.settings.n
        assert 0 < trial.cost <= largest
        assert trial.verdict != "whole" or (trial.cost <= 100 and trial.examples == 12)


@hypothesis(deadline=None, max_examples=20)
@given(st.integers(0, 50), st.integers(300, 4000))
def test_the_seed_decides_and_an_interrupted_search_goes_on_as_if_nothing_was(seed, budget):
    whole = economy(budget=budget, seed=seed)
    list(whole.run())
    half = economy(budget=budget // 2, seed=seed)
    list(half.run())
    text = json.dumps(half.document())
    kept = [Trial.read(values) for values in json.loads(text)["trials"]]
    kept = [trial for trial in kept if trial.verdict != "unfinished"]
    rest = economy(budget=budget, seed=seed, trials=kept)
    list(rest.run())
    assert rest.trials == whole.trials


def test_what_was_too_expensive_is_not_tried_again():
    search = economy(per_question=60)
    trials = list(search.run())
    for place, trial in enumerate(trials):
        for before in trials[:place]:
            if before.verdict == "expensive":
                assert (
                    trial.settings.n < before.n
                    or trial.settings.max_new_tokens < before.settings.max_new_tokens
                )
    assert search.document()["skipped"] > 0


def test_no_answer_is_written_twice_unless_it_was_cut():
    write = Coins()
    list(economy(write=write).run())
    lengths = {}
    for prompt, settings, seed in write.calls:
        key = (prompt, settings.temperature, settings.top_p, seed)
        assert settings.max_new_tokens > lengths.get(key, 0)
        assert lengths.get(key, 0) < 30
        lengths[key] = settings.max_new_tokens


def test_a_trial_is_given_up_before_all_examples_only_where_bounds_say_so():
    """Against what the mean over all examples would have been."""
    search = economy(per_question=90)
    wrong = 0
    for trial in search.run():
        whole = economy(per_question=1e9, budget=10**9)._try(trial.settings)
        assert whole.verdict == "whole"
        if trial.verdict == "expensive":
            wrong += whole.cost <= 90
        if trial.verdict == "behind":
            wrong += whole.score > max(t.score for t in search.trials if t.verdict == "whole")
    assert wrong <= 0.1 * len(search.trials)


@hypothesis(deadline=None, max_examples=20)
@given(st.integers(1, 300))
def test_the_bound_shrinks_to_nothing(total):
    slacks = [_slack(seen, total) for seen in range(1, total + 1)]
    assert slacks[-1] == 0
    assert min(slacks) >= 0


@hypothesis(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_proposals_stay_within_the_limits(seed):
    rng = np.random.default_rng(seed)
    space = SearchSpace((0.0, 0.7), (0.3, 0.9), (2, 5), (10, 20))
    settings = space.draw(rng)
    for _ in range(4):
        assert 0 <= settings.temperature <= 0.7
        assert 0.3 <= settings.top_p <= 0.9 or settings.top_p == 1
        assert 2 <= settings.n <= 5
        assert 10 <= settings.max_new_tokens <= 20
        settings = space.near(settings, rng)


def test_a_model_answers_with_the_beginning_of_a_longer_answer():
    lm = ToyLM(stop_tokens=(3,))
    write, read = writer(lm, stop=["zz"]), reader(lm, ["zz"])
    settings = SamplingSettings(1.3, 0.9, 1, 30)
    long = write("Once", settings, 5)
    for length in (1, 4, 30):
        assert write("Once", replace(settings, max_new_tokens=length), 5) == long[:length]
    assert read([1, 2, 3]) == "bc"
    assert read([1, 2]) == "bc"


def test_bad_input_is_refused(tmp_path):
    for space in ({"n": (0, 3)}, {"tokens": (5, 4)}, {"top_p": (0, 1)}, {"top_p": (0.5, 2)}):
        with pytest.raises(RequestError, match="expected increasing limits"):
            SearchSpace(**space)
    with pytest.raises(RequestError, match="no examples"):
        SamplingSearch([], Coins(), str, scorer("exact"), 1, 1)
    with pytest.raises(RequestError, match="above 0"):
        economy(per_question=float("nan"))
    odd = economy()
    odd.score = lambda text, answer: 2.0
    with pytest.raises(RequestError, match="scorer returned 2"):
        list(odd.run())
    path = tmp_path / "examples.jsonl"
    for content in (b'{"prompt": "a"}', b"[]", b'{"prompt": "", "answer": ""}', b"[" * 99_999):
        path.write_bytes(content)
        with pytest.raises(RequestError, match="line 1"):
            read_examples(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="UTF-8"):
        read_examples(path)
    path.write_text('\n{"prompt": "a", "answer": "b"}\n')
    assert read_examples(path) == [Example("a", "b")]


def test_scorers_by_name():
    assert scorer("exact")(" 42\n", "42") == 1
    assert scorer("exact")("42.", "42") == 0
    assert scorer("regex")("it is 42.", r"\b4\d\b") == 1
    assert scorer("regex")("it is 422.", r"\b4\d\b") == 0
    with pytest.raises(RequestError, match="not a regular expression"):
        scorer("regex")("", "(")
    assert scorer("command", "grep -q")("it is 42", "42") == 1
    assert scorer("command", "grep -q")("it is 42", "43") == 0
    assert scorer("command", "echo 0.25 #")("text", "answer") == 0.25
    for printed in ("much", "2", "nan"):
        with pytest.raises(RequestError, match="expected a number from 0 to 1"):
            scorer("command", f"echo {printed} #")("", "")
    with pytest.raises(RequestError, match="took more than"):
        scorer("command", "sleep 5 #", 0.1)("", "")
    for name, command in (("vibes", ""), ("exact", "true"), ("command", "")):
        with pytest.raises(MethodError):
            scorer(name, command)


def test_trials_survive_a_file():
    trial = Trial(SamplingSettings(0.5, 1.0, 2, 16), "whole", 0.5, 20.0, 2, 4, 99, 1)
    assert Trial.read(json.loads(json.dumps(asdict(trial)))) == trial

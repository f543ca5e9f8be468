"""Measurements with a real engine on a tiny model: what they say, and never how long they take."""

import numpy as np
import pytest

from paceline.engines.head_screen import HeadScreen
from paceline.errors import ModelError, RequestError
from paceline.kvcache.base import parse_policy
from paceline.lm import LM
from paceline.measuring.baseline import decode
from paceline.measuring.prompts import Dialogue
from paceline.measuring.quality import score_window
from paceline.models.trace import trace_path
from paceline.planning.decoded_loss import decoded_nats
from paceline.planning.measured_facts import DraftFacts, EngineFacts, ReadFacts
from paceline.planning.measurer import EngineMeasurer
from paceline.planning.model_sizes import page_bytes, parameters
from paceline.planning.settled_head import settle_head
from paceline.planning.setups import ALL_ROWS, CacheForm, Setup
from paceline.planning.verification import ModelRunner
from tests.conftest import shared

MODEL = str(shared("models", "stories260K"))
TEXT = "Once upon a time there was a little girl named Lily. She liked to play outside. " * 12


@pytest.fixture
def measurer(tmp_path):
    dialogues = [Dialogue(("Once upon a time",), "text", 1), Dialogue(("Lily was",), "text", 2)]
    measurer = EngineMeasurer(MODEL, dialogues, TEXT, tokens=8, folder=tmp_path)
    yield measurer
    measurer.close()


def test_an_engine_is_described(measurer):
    facts = EngineFacts.parse(measurer.engine(MODEL, "int8", 1))
    with LM(MODEL, dtype="int8", threads=1) as lm:
        assert facts.weight_bytes == lm.engine.weight_bytes
        assert facts.page_bytes["fp32"] == lm.engine.memory.page_bytes
    assert (facts.format, facts.threads, facts.predicted) == ("int8", 1, False)
    assert parameters(measurer.model) > 200_000


def test_weights_that_stream_take_what_they_may(measurer):
    whole = EngineFacts.parse(measurer.engine(MODEL, "auto", 1))
    budget = int(0.8 * whole.weight_bytes)
    facts = EngineFacts.parse(measurer.engine(MODEL, "auto", 1, budget))
    assert facts.weight_bytes == budget
    assert facts.streamed > 0
    assert whole.batch_overhead >= facts.batch_overhead == 0
    assert facts.nodes[0] == 1
    with pytest.raises(ModelError, match="expected at least"):
        measurer.engine(MODEL, "auto", 1, 1000)


def test_page_sizes_are_those_of_engines(measurer):
    for name, size in page_bytes(measurer.model).items():
        with LM(MODEL, kv_format=name) as lm:
            assert lm.engine.memory.page_bytes == size


def test_losses_are_of_the_same_windows(measurer):
    stored, rounded = (measurer.nats(MODEL, name, ALL_ROWS, 0) for name in ("auto", "int4"))
    assert len(stored) == len(rounded) >= 2
    assert np.mean(rounded) != np.mean(stored)
    assert measurer.nats(MODEL, "auto", CacheForm("int8"), 0) != stored
    with pytest.raises(RequestError, match="the text has"):
        measurer.nats(MODEL, "auto", CacheForm(policy="sliding_window:budget=64"), 500)


def test_a_policy_that_drops_nothing_loses_nothing(measurer):
    lm = measurer.open(MODEL, {"dtype": "auto", "kv_format": "auto", "threads": None})
    window = np.array(lm.encode(TEXT)[:100], np.int32)
    whole, _ = score_window(lm.engine, window)
    same = decoded_nats(lm.engine, parse_policy("sliding_window:budget=200,every=7"), window)
    assert same == pytest.approx(whole, abs=1e-4)
    short = decoded_nats(lm.engine, parse_policy("sliding_window:budget=8,every=4,sinks=1"), window)
    assert short[:8] == pytest.approx(whole[:8], abs=1e-4)  # before it drops anything
    assert np.abs(short[12:] - whole[12:]).max() > 0.01
    assert lm.engine.memory.used == 0


def test_a_pattern_that_reads_everything_loses_nothing(measurer):
    stored, whole, few = (
        measurer.nats(MODEL, "auto", CacheForm(attention=name), 40)
        for name in (None, "quest:share=1", "quest:share=0,least=16,sinks=0,local=16")
    )
    assert whole == pytest.approx(stored, abs=1e-4)
    assert np.abs(np.array(few) - stored).max() > 1e-4


def test_a_pattern_reads_a_share_and_keeps_bounds_of_keys(measurer):
    facts = ReadFacts.parse(measurer.reads("quest:least=16,local=16", 100))
    assert facts.share >= 0
    with LM(MODEL) as whole, LM(MODEL, attention="quest") as few:
        pages = few.engine.memory.page_bytes - whole.engine.memory.page_bytes
    assert facts.page_bytes == pages > 0


def test_a_warm_start_has_a_name(measurer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measurer.warm_start() == ""
    path = trace_path(measurer.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"some texts")
    assert "10 bytes" in measurer.warm_start()


def test_the_copy_of_a_head_is_made_and_counted(measurer, monkeypatch):
    without = measurer.engine(MODEL, "auto", 1)["weight_bytes"]
    measurer.close()
    monkeypatch.setattr(HeadScreen, "SMALLEST", 0)
    facts = measurer.engine(MODEL, "auto", 1)
    assert facts["weight_bytes"] > without
    with LM(MODEL, threads=1, drafter="plain") as lm:
        assert settle_head(lm.engine) == facts["weight_bytes"] - without
        assert settle_head(lm.engine) == lm.engine.head_screen.bytes
        assert lm.engine.memory.used == 0


def test_a_drafter_is_described(measurer):
    facts = DraftFacts.parse(measurer.drafts("suffix"))
    assert facts.gained[0] == 1
    assert (np.diff(facts.gained) >= 0).all()
    assert facts.state_bytes > 0
    plain = DraftFacts.parse(measurer.drafts("plain"))
    assert set(plain.gained) == {1.0}
    assert plain.forward > 0
    assert facts.automatic > 0
    assert plain.automatic == 0  # a budget has nothing to choose


def test_a_drafter_that_is_slower_than_passes_answers_one_prompt(measurer, monkeypatch):
    answered = []

    def decoded(lm, drafter, request, budget):
        output = decode(lm, drafter, request, budget)
        answered.append(request)
        output.seconds.draft = 3 * output.seconds.forward
        return output

    monkeypatch.setattr("paceline.planning.measurer.decode", decoded)
    facts = DraftFacts.parse(measurer.drafts("suffix"))
    assert len(answered) == 2  # the first one is not counted
    assert answered[0] is answered[1]
    assert facts.seconds > 0


def test_a_draft_model_counts_its_memory(measurer):
    facts = DraftFacts.parse(measurer.drafts(f"model:path={MODEL},format=int8"))
    assert facts.model_bytes > 0
    assert facts.page_bytes > 0


def test_a_judge_scores_answers(tmp_path):
    dialogues = [Dialogue(("Once upon a time",), "text", 1)]
    judge = tmp_path / "judge"
    judge.write_text('#!/bin/sh\ntest "$1" = "Once upon a time" && grep -q . && echo 0.25\n')
    judge.chmod(0o755)
    measurer = EngineMeasurer(MODEL, dialogues, TEXT, tokens=4, judge=str(judge), folder=tmp_path)
    assert measurer.scores(MODEL, "auto", ALL_ROWS) == [0.25]


@pytest.mark.parametrize("users", [1, 3])
def test_setups_run_to_the_end(measurer, users):
    runner = ModelRunner(Setup(MODEL, "int8", budget=4), measurer.requests, users)
    runner.begin_round()
    time = runner.run(0)
    assert time.tokens == 8 * users
    assert time.seconds > 0
    assert time.first_token > 0
    runner.close()

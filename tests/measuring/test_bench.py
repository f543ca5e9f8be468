import json
import re
from pathlib import Path

import pytest

from paceline.measuring import bench as module
from paceline.measuring.bandwidth import Bandwidth
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.bench import bench
from paceline.measuring.prompts import Dialogue
from paceline.measuring.report.document import bench_document
from paceline.measuring.report.tables import bench_tables
from tests.measuring.toy_lm import Broken, Knowing, ToyLM
from tests.toy import Oracle

DIALOGUES = [Dialogue(("Once upon",), "text", 1), Dialogue(("One", "Two"), "qa", 3)]
SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "bench-json.md"


def bench_schema():
    return json.loads(re.search(r"```json\n(.*?)```", SCHEMA.read_text(), re.S)[1])


@pytest.fixture(autouse=True)
def _no_memory_test(monkeypatch):
    monkeypatch.setattr(module, "measure_bandwidth", lambda threads: Bandwidth(1e9, 1 << 28, 2))


def run(lm, **options):
    asking = TurnOptions(12, ignore_eos=True)
    return bench(
        lm,
        {"oracle": Knowing(lm.engine)},
        DIALOGUES,
        asking,
        options.pop("budgets", [2, 8]),
        **options,
    )


def test_all_arms_decode_the_same_tokens_past_the_end():
    lm = ToyLM(stop_tokens=tuple(range(11)))
    result = run(lm, repeat=2)
    assert [arm.name for arm in result.arms] == ["plain", "oracle@2", "oracle@8"]
    found = bench_document(result)
    for arm in found["arms"]:
        assert (arm["runs"], arm["tokens"], arm["different"]) == (6, 72, 0)
        assert arm["categories"]["qa"]["prompts"] == 2
    plain, few, many = found["arms"]
    assert plain["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert plain["tokens_per_pass"] == plain["nodes_per_pass"] == 1
    assert 1 < few["tokens_per_pass"] < many["tokens_per_pass"]
    assert lm.engine.opened == 0


def test_the_ratio_pairs_the_medians_of_each_prompt():
    result = run(ToyLM(), repeat=3)
    times = {"plain": (2.0, 9.0, 4.0), "oracle@2": (1.0, 1.0, 8.0), "oracle@8": (4.0, 4.0, 4.0)}
    for arm in result.arms:
        for runs in arm.runs.values():
            for one, seconds in zip(runs, times[arm.name], strict=True):
                one.seconds.decode, one.seconds.prefill = seconds, 1.0
    few, many = (arm for arm in bench_document(result)["arms"][1:])
    assert few["ratio"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert few["ratio_with_prefill"]["median"] == 2.5
    assert many["ratio"]["median"] == 1.0
    assert few["tokens_per_second"] == 12.0


def test_totals_weigh_prompts_by_their_time():
    result = run(ToyLM(), repeat=1)
    times = {"plain": (6.0, 1.0, 1.0), "oracle@2": (2.0, 1.0, 1.0), "oracle@8": (8.0, 8.0, 8.0)}
    for arm in result.arms:
        for runs, seconds in zip(arm.runs.values(), times[arm.name], strict=True):
            runs[0].seconds.decode = seconds
    plain, few, many = bench_document(result)["arms"]
    assert plain["total"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (few["ratio"]["median"], few["total"]["ratio"]["value"]) == (1.0, 2.0)
    assert few["total"]["tokens_per_second"] == 36 / 4
    assert many["total"]["ratio"]["value"] == pytest.approx(1 / 3)


def test_a_pass_costs_its_parts_and_plain_decoding_drafts_nothing():
    for arm in bench_document(run(ToyLM(), repeat=1))["arms"]:
        cost = arm["pass_seconds"]
        assert 0 < cost["forward"] + cost["walk"] + cost["draft"] < cost["decode"]
        assert (cost["draft"] > 0) == (arm["name"] != "plain")
        for part, seconds in cost.items():
            assert seconds * arm["passes"] == pytest.approx(arm["seconds"][part])


def test_scores_are_compared_with_what_came_true():
    found = bench_document(run(ToyLM(), repeat=2))
    plain, few, _ = found["arms"]
    assert plain["reliability"] == []
    (row,) = few["reliability"]
    # Of each pair of siblings one is right; the last token wanted is drawn without a guess.
    assert (row["origin"], row["predicted"]) == ("oracle", 0.5)
    assert row["guessed"] == row["tested"] == few["nodes_per_pass"] * few["passes"] - few["passes"]
    assert row["observed"] * row["tested"] == few["tokens"] - few["passes"]
    assert [bucket["low"] for bucket in row["buckets"]] == [0.5]


def test_the_middle_prompt_is_traced_in_every_arm():
    found = bench_document(run(ToyLM(), repeat=1))
    assert found["trace"]["prompt"] == found["prompts"][1]["name"] == "line 3 turn 1"
    for arm in found["arms"]:
        tokens = found["trace"]["arms"][arm["name"]]
        answer = arm["answers"][1]
        assert (len(tokens), tokens[-1]["number"]) == (answer["tokens"], answer["passes"])


def test_arms_take_turns_and_the_order_rotates(monkeypatch):
    order = []
    true_run = module._run
    monkeypatch.setattr(
        module, "_run", lambda lm, arm, *rest: order.append(arm.name) or true_run(lm, arm, *rest)
    )
    run(ToyLM(), repeat=2)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(set(names) == {"plain", "oracle@2", "oracle@8"} for names in rounds)
    assert {names[0] for names in rounds} == {"plain", "oracle@2", "oracle@8"}


@pytest.mark.parametrize(("state", "resets"), [("carried", 2), ("reset", 2 + 2 * 3)])
def test_drafters_are_reset_each_round_or_each_prompt(monkeypatch, state, resets):
    count = []
    monkeypatch.setattr(Oracle, "reset", lambda self: count.append(self))
    run(ToyLM(), repeat=2, states=[state])
    assert len(count) == 2 * resets  # two arms have an oracle


def test_a_wrong_output_is_noticed():
    lm = ToyLM(Broken(length=14, nudge=9.0))
    plain, *others = bench_document(run(lm, repeat=1))["arms"]
    assert plain["different"] == 0
    assert all(arm["different"] for arm in others)


def test_the_document_follows_the_documented_schema():
    jsonschema = pytest.importorskip("jsonschema")
    from paceline.measuring.report.document import conditions

    lm = ToyLM()
    found = bench_document(run(lm, repeat=1))
    schema = bench_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in ("prompts", "arms", "cost", "bandwidth", "memory", "trace", "clipped"):
        rules = {**schema["properties"][part], "$defs": schema["$defs"]}
        jsonschema.validate(found[part], rules)
    for part, value in conditions(lm, "toy").items():
        jsonschema.validate(value, schema["properties"][part])


def test_the_tables_show_every_arm_category_and_size():
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as drawn:
        console.print(bench_tables(bench_document(run(ToyLM(), repeat=1))))
    shown = drawn.get()
    for word in ("oracle@8", "qa", "T(n)/T(1)", "after 32 tokens", "1.0 GB/s with 2 threads"):
        assert word in shown


def test_a_governor_starts_anew_each_round_and_reports():
    result = run(ToyLM(), repeat=2, budgets=["auto"])
    plain, auto = bench_document(result)["arms"]
    assert (auto["name"], auto["budget"], auto["different"]) == ("oracle@auto", "auto", 0)
    assert plain["governor"] is None
    assert auto["governor"]["passes"] == sum(
        runs[-1].passes for runs in result.arms[1].runs.values()
    )

"""Plans over a table of measurements: what is chosen, what is told, and what is not run."""

from contextlib import contextmanager

import pytest

from paceline.engines.kv_formats import GROUPED_KV
from paceline.errors import RequestError
from paceline.kvcache.base import parse_policy
from paceline.planning.candidates import left_out, policies
from paceline.planning.lab import PairedLoss
from paceline.planning.measured_facts import PromptFacts
from paceline.planning.plan_document import notes, plan_document, plan_table
from paceline.planning.plan_report import pareto, plan_page
from paceline.planning.setups import Goal, Setup
from tests.planning.fake_measurer import MODEL, FakeMeasurer, FakeRunner, a_planner, a_search


def planned(folder, goal=None, measurer=None, factors=None, verify=True, **options):
    search = a_search(folder, measurer, goal=goal or Goal(), **options)
    planner = a_planner(search, factors, verify)
    return planner.run(), planner


def test_the_fastest_format_within_the_loss_is_chosen_and_its_rivals_are_run(tmp_path):
    result, planner = planned(tmp_path)
    chosen = result.plan.chosen
    assert (chosen.setup.format, chosen.setup.drafter, chosen.exact) == ("int8", "blend", False)
    assert chosen.loss == pytest.approx(0.001)
    assert chosen.low <= chosen.speed <= chosen.high
    assert next(each.setup for each in planner.runners) == Setup(MODEL)  # the default is run, too
    assert {each.rounds for each in planner.runners} == {3}
    assert all(each.closed for each in planner.runners)


def test_exact_plans_keep_the_format_as_stored(tmp_path):
    result, planner = planned(tmp_path, Goal(exact=True, loss=0.0))
    assert result.plan.chosen.exact
    assert all(row.exact and row.setup.format == "auto" for row in result.plan.rows)
    assert not any(call.startswith("nats") for call in planner.search.lab.measurer.calls)
    assert not any("int" in call for call in planner.search.lab.measurer.calls)


def test_a_plan_is_never_slower_than_the_default_that_was_run(tmp_path):
    result, _ = planned(tmp_path, factors={"int8": 0.3})
    assert result.plan.chosen.setup == Setup(MODEL)


def test_of_equally_fast_setups_the_exact_one_is_chosen(tmp_path):
    result, _ = planned(tmp_path, factors={"int8": 0.605})  # 90.75 against 90
    assert result.plan.chosen.exact


def test_the_least_memory_can_be_preferred(tmp_path):
    result, _ = planned(tmp_path, Goal(context=8192, loss=0.1, prefer="memory"))
    chosen = result.plan.chosen
    assert (chosen.setup.format, chosen.setup.kv_format) == ("int4", "int8")
    assert chosen.setup.plain
    assert chosen.memory == min(
        each.forecast.memory for each in result.candidates if each.fits(result.plan.goal)
    )


def test_memory_leaves_out_what_cannot_fit_before_it_runs(tmp_path):
    result, planner = planned(tmp_path, Goal(memory=70_000_000, loss=0.1))
    assert result.plan.chosen.setup.format == "int4"
    assert f"engine {MODEL} int8 None" not in planner.search.lab.measurer.calls
    assert f"nats {MODEL} int8 auto None None 0" not in planner.search.lab.measurer.calls
    assert "MB at least" in result.left_out[f"{MODEL} int8"]


def test_impossible_goals_are_answered_with_what_is_possible(tmp_path):
    with pytest.raises(RequestError) as caught:
        planned(tmp_path, Goal(memory=40_000_000, context=1000, users=2))
    said = str(caught.value)
    assert said.startswith("40 MB cannot hold model with 1000 tokens for 2 users at a loss of")
    assert "the smallest measured is" in said
    assert "int4" in said
    assert "loss 0.14" in said
    assert "\n" not in said


def test_an_impossible_loss_names_the_smallest_within_it_as_well(tmp_path):
    with pytest.raises(RequestError, match=r"within that loss 1\d\d MB .*int8"):
        planned(tmp_path, Goal(memory=21_000_000))


def test_an_impossible_goal_names_what_fits_and_there_was_no_time_to_measure(tmp_path):
    def said(memory, **options):
        with pytest.raises(RequestError) as caught:
            planned(tmp_path, Goal(memory=memory), **options)
        return str(caught.value)

    late = {"deadline": 0.0, "verify": False}
    text = said(80_000_000, **late)  # int8 takes 100 MB, and 4 bits some 60
    assert "the smallest predicted is" in text
    assert "; int4" in text
    assert "its loss is not measured: the same command with more --minutes" in text
    assert "its loss" not in said(15_000_000, **late)


def test_a_longer_context_than_the_model_sees_is_refused(tmp_path):
    with pytest.raises(RequestError, match="sees 8192"):
        a_search(tmp_path, goal=Goal(context=8193))


def test_another_checkpoint_competes(tmp_path):
    result, _ = planned(tmp_path, Goal(memory=45_000_000, loss=0.4), others={"small": 30_000_000})
    chosen = result.plan.chosen
    assert chosen.setup.model == "small"
    assert chosen.needs == "the checkpoint small"
    assert chosen.fingerprint == "print of small"


def test_measurements_are_kept_and_a_second_plan_makes_none(tmp_path):
    planned(tmp_path)
    _, planner = planned(tmp_path)
    assert planner.search.lab.measurer.calls == []
    assert planner.search.lab.made == 0


def test_drafters_are_measured_again_from_a_new_warm_start(tmp_path):
    planned(tmp_path)
    warm = FakeMeasurer()
    warm.warm = "a trace"
    planned(tmp_path, measurer=warm)
    assert "drafts blend" in warm.calls
    assert all(call.startswith("drafts") for call in warm.calls)


def test_a_killed_plan_goes_on_where_it_was(tmp_path):
    class Killed(FakeMeasurer):
        def drafts(self, drafter, nodes=16):
            if drafter == "recycle":
                raise KeyboardInterrupt
            return super().drafts(drafter, nodes)

    first = Killed()
    with pytest.raises(KeyboardInterrupt):
        planned(tmp_path, measurer=first)
    second = FakeMeasurer()
    result, _ = planned(tmp_path, measurer=second)
    assert not set(first.calls) & set(second.calls)
    assert result.plan.chosen.setup.format == "int8"


def test_damaged_measurements_are_made_again(tmp_path):
    planned(tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("*/*.json"))):
        file.write_text(("{", "[]", "null", '{"nodes": [1]}', "\x00", "[NaN]")[number % 6])
    result, planner = planned(tmp_path)
    assert planner.search.lab.made > 3
    assert result.plan.chosen.setup.format == "int8"


def test_without_time_everything_is_predicted_and_only_the_exact_is_chosen(tmp_path):
    result, planner = planned(tmp_path, deadline=0.0, verify=False)
    assert planner.search.lab.measurer.calls == ["bandwidth"]
    assert result.plan.chosen.exact
    assert result.plan.chosen.speed is None
    assert result.plan.chosen.setup == Setup(MODEL)
    assert "forecasts" in " ".join(notes(result))
    assert "go" in " ".join(notes(result))
    assert "no time" in result.left_out["blend"]


def test_the_default_is_no_faster_than_plain_decoding_before_its_drafter_is_measured(tmp_path):
    class Slow(FakeMeasurer):
        def drafts(self, drafter, nodes=16):
            if drafter != "plain":
                raise RequestError("not yet")
            return {**super().drafts(drafter, nodes), "overhead": 0.02}  # as long as a pass

    result, _ = planned(tmp_path, measurer=Slow())
    plain, default = (
        next(each.forecast for each in result.candidates if each.setup == setup)
        for setup in (Setup(MODEL, drafter="plain", budget=0), Setup(MODEL))
    )
    assert default.tokens_per_second == pytest.approx(plain.tokens_per_second)


def test_setups_are_run_while_no_other_plan_measures(tmp_path):
    search = a_search(tmp_path)
    planner, held = a_planner(search), []

    @contextmanager
    def alone():
        held.append(True)
        yield
        held.pop()

    run = FakeRunner.run
    planner.verification.alone = alone
    opened = planner.verification.open

    def watched(setup):
        runner = opened(setup)
        runner.run = lambda turn: (assert_held(), run(runner, turn))[1]
        return runner

    def assert_held():
        assert held

    planner.verification.open = watched
    assert planner.run().verified
    assert not held


def test_when_time_ends_what_was_measured_is_used(tmp_path):
    times = iter([0.0] * 6 + [2.0] * 1000)
    result, planner = planned(tmp_path, clock=lambda: next(times))
    assert 0 < planner.search.lab.made <= 6
    assert planner.search.lab.unmeasured
    assert result.plan.rows


def test_a_format_that_is_refused_is_named_with_its_reason(tmp_path):
    result, _ = planned(tmp_path, measurer=FakeMeasurer({"auto:act=int8": 0.0}))
    assert result.left_out["auto:act=int8"] == "no format auto:act=int8"
    assert all(each.setup.format != "auto:act=int8" for each in result.candidates)


def test_a_model_that_the_engine_cannot_run_is_refused(tmp_path):
    class Refusing(FakeMeasurer):
        def engine(self, path, weight_format, threads, weights_memory=None):
            raise RequestError("it rounds activations; take another engine")

    with pytest.raises(RequestError, match="cannot be planned: it rounds"):
        planned(tmp_path, measurer=Refusing())


def test_a_judge_bounds_the_score_that_is_lost(tmp_path):
    measurer = FakeMeasurer()
    result, _ = planned(tmp_path, Goal(loss=0.01), measurer=measurer, judged=True)
    assert result.plan.chosen.setup.format == "int8"
    assert result.plan.chosen.loss == pytest.approx(0.005)
    assert not any(call.startswith("nats") for call in measurer.calls)
    strict, _ = planned(tmp_path, Goal(loss=0.001), judged=True)
    assert strict.plan.chosen.exact


def test_policies_compete_where_a_text_of_the_user_may_be_long_enough(tmp_path):
    goal = Goal(context=4096, loss=1.0, prefer="memory")
    result, planner = planned(tmp_path, goal, long_text=True)
    assert result.plan.chosen.setup.kv_policy is not None
    assert any("4096" in call for call in planner.search.lab.measurer.calls)
    without, _ = planned(tmp_path / "other", goal)
    assert without.plan.chosen.setup.kv_policy is None


def test_patterns_compete_where_prompts_are_long(tmp_path):
    long = PromptFacts(4000.0, 50)
    goal = Goal(loss=0.02)
    result, planner = planned(tmp_path, goal, long_text=True, prompts=long)
    assert result.plan.chosen.setup.attention is not None
    assert result.plan.chosen.setup.attention.endswith(":share=0.1")
    asked = planner.search.lab.measurer.calls
    assert "reads quest:share=0.1 4025" in asked
    assert any("quest:share=0.1 4050" in call for call in asked if call.startswith("nats"))
    for others in ({"prompts": long}, {"long_text": True}):
        without, _ = planned(tmp_path / str(len(others)), goal, **others)
        assert all(each.setup.attention is None for each in without.candidates)
    strict, _ = planned(tmp_path, Goal(exact=True, loss=0.0), long_text=True, prompts=long)
    assert strict.plan.chosen.setup.attention is None
    assert "attention pattern lm_infinite" in left_out()
    assert "attention pattern block_sparse" in left_out()  # of prompts alone
    assert "attention pattern quest" not in left_out()


def test_patterns_are_not_planned_on_grouped_caches(tmp_path):
    long = PromptFacts(4000.0, 50)
    result, _ = planned(tmp_path, Goal(loss=9.0), long_text=True, prompts=long)
    few = [each.setup for each in result.candidates if each.setup.attention is not None]
    assert few
    assert not [setup for setup in few if setup.kv_format in GROUPED_KV or setup.kv_policy]


STREAMED = Goal(memory=60_000_000, exact=True, loss=0.0)


def test_weights_stream_where_they_do_not_fit_and_nothing_may_be_lost(tmp_path):
    result, planner = planned(tmp_path, STREAMED)
    chosen, calls = result.plan.chosen, planner.search.lab.measurer.calls
    setup, streamed = chosen.setup, planner.search.streamed
    facts = streamed.deep[setup.drafter]
    assert setup.weights_memory == streamed.weights_memory(setup.budget, facts)
    assert setup.weights_memory > streamed.weights_memory(setup.budget)  # this drafter is small
    assert {f"streamed {planner.search.streamed.weights_memory(n)}" for n in (16, 128)} <= {*calls}
    assert (chosen.exact, chosen.loss, chosen.memory <= 60_000_000) == (True, 0.0, True)
    assert f"--weights-memory {setup.weights_memory}" in setup.command()
    for goal in (Goal(memory=10**9), Goal()):
        assert not a_search(tmp_path / "all", goal=goal).streamed.possible


def test_large_trees_are_measured_where_weights_stream_and_never_sized_by_auto(tmp_path):
    result, planner = planned(tmp_path, STREAMED)
    chosen = result.plan.chosen.setup
    assert (chosen.drafter, chosen.budget) == ("blend", 128)  # a pass takes 1.2 times as long
    assert "drafts blend 128" in planner.search.lab.measurer.calls
    streamed = [each.setup for each in result.candidates if each.setup.weights_memory]
    assert {each.budget for each in streamed} == {0, 4, 8, 16, 32, 64, 128}
    small = [each for each in result.candidates if each.setup.weights_memory]
    assert all(each.forecast.memory <= STREAMED.memory for each in small)


def test_large_trees_that_take_three_plain_passes_are_not_considered(tmp_path):
    class Computing(FakeMeasurer):
        def streamed(self, weights_memory):
            return {**super().streamed(weights_memory), "seconds": [0.1, 0.8]}

    result, planner = planned(tmp_path, STREAMED, Computing())
    assert planner.search.streamed.largest == 32
    assert max(each.setup.budget for each in result.candidates if each.setup.weights_memory) == 32


def test_a_budget_that_leaves_too_little_for_weights_is_not_considered(tmp_path):
    goal = Goal(memory=38_500_000, exact=True, loss=0.0)
    result, planner = planned(tmp_path, goal)
    small = planner.search.streamed
    assert small.weights_memory(16) > 20_000_000 > 0.99 * small.weights_memory(128)
    assert small.largest < 128 or small.weights_memory(128) >= 20_000_000
    assert result.plan.chosen.memory <= goal.memory


def test_forecasts_of_streamed_setups_are_for_the_speed_that_the_disk_has_now(tmp_path):
    before, _ = planned(tmp_path, STREAMED)
    slower = FakeMeasurer()
    slower.disk = 0.2  # seconds of a plain pass, which took 0.1
    after, _ = planned(tmp_path, STREAMED, slower)
    was, now = (each.plan.chosen.predicted for each in (before, after))
    assert now == pytest.approx(was / 2, rel=0.02)


def test_the_loss_of_combinations_is_measured_before_they_are_run(tmp_path):
    goal = Goal(context=8192, loss=0.0029, prefer="memory")
    result, planner = planned(tmp_path, goal)
    assert result.plan.chosen.setup.kv_format in ("fp16", "auto")
    whole = [each for each in planner.search.lab.measurer.calls if "int8 fp16" in each]
    assert whole, "the chosen combination was measured as a whole"


def test_forecasts_are_for_the_speed_that_the_machine_has_now(tmp_path):
    before, _ = planned(tmp_path)
    slower = FakeMeasurer()
    slower.speed = 0.02
    after, _ = planned(tmp_path, measurer=slower)
    assert slower.calls == []
    for was, now in zip(before.candidates[:5], after.candidates[:5], strict=True):
        assert was.setup == now.setup
        assert now.forecast.tokens_per_second == pytest.approx(was.forecast.tokens_per_second / 2)


def test_faster_threads_are_considered(tmp_path):
    class Faster(FakeMeasurer):
        def engine(self, path, weight_format, threads, weights_memory=None):
            facts = super().engine(path, weight_format, threads, weights_memory)
            if threads == 1:
                facts["seconds"] = [each / 3 for each in facts["seconds"]]
            return facts

    result, _ = planned(tmp_path, measurer=Faster())
    assert any(row.setup.threads == 1 for row in result.plan.rows)


def test_a_setup_that_cannot_be_run_is_left_out_with_its_reason(tmp_path):
    planner = a_planner(a_search(tmp_path))
    whole = planner.verification.open

    def opened(setup):
        if setup.format == "int8":
            raise RequestError("no memory for it")
        return whole(setup)

    planner.verification.open = opened
    result = planner.run()
    assert result.plan.chosen.setup.format == "auto"
    assert "no memory for it" in result.left_out.values()

    def refuse(setup):
        raise RequestError("nothing can be run")

    planner.verification.open = refuse
    with pytest.raises(RequestError, match="nothing can be run"):
        planner.run()


def test_policies_are_not_planned_on_caches_that_cannot_evict(tmp_path):
    goal = Goal(context=4096, loss=9.0, prefer="memory")
    result, _ = planned(tmp_path, goal, long_text=True)
    grouped = [each.setup for each in result.candidates if each.setup.kv_format in GROUPED_KV]
    assert grouped
    assert not [setup for setup in grouped if setup.kv_policy is not None]


@pytest.mark.parametrize("context", [1024, 1500, 8192])
def test_policies_that_are_considered_can_be_made(context):
    names = policies(Goal(context=context), context)
    assert len(names) > 8
    assert all(parse_policy(name).max_rows(context) <= context for name in names)
    assert policies(Goal(context=context, exact=True, loss=0.0), context) == []
    assert policies(Goal(), 1023) == []


def test_documents_tables_and_pages_hold_the_plan(tmp_path):
    result, _ = planned(tmp_path)
    document = plan_document(result)
    assert document["setups"][0]["command"].startswith("paceline generate --model folder/model")
    assert document["errors"]["largest"] >= document["errors"]["median"]
    assert plan_table(result).row_count == len(result.plan.rows)
    page = plan_page(result)
    assert "<svg" in page
    assert "Predicted and measured" in page
    assert "<script" not in page


def test_the_pareto_front_is_beaten_by_nothing(tmp_path):
    result, _ = planned(tmp_path)
    front = pareto(result.candidates)
    assert front
    for each in front:
        for other in result.candidates:
            if other.loss is None:
                continue
            better = other.forecast.tokens_per_second > each.forecast.tokens_per_second
            loss = PairedLoss(0.0, 0.0) if each.exact else each.loss
            assert not (
                better
                and other.forecast.memory <= each.forecast.memory
                and other.loss.value <= loss.value
            )


@pytest.mark.parametrize(
    "values",
    [
        {"memory": 0},
        {"context": 1},
        {"users": 0},
        {"users": 5000},
        {"loss": -0.1},
        {"loss": float("nan")},
        {"prefer": "beauty"},
    ],
)
def test_goals_out_of_range_are_refused(values):
    with pytest.raises(RequestError, match="expected"):
        Goal(**values)


def test_a_setup_is_a_command_line():
    setup = Setup("a model", "int8", "model:path=x y", 4, "fp16", "h2o:budget=64", "quest", 2)
    assert setup.command("chat") == (
        "paceline chat --model 'a model' --format int8 --drafter 'model:path=x y' --budget 4 "
        "--kv-format fp16 --kv-policy h2o:budget=64 --attention quest --threads 2"
    )
    assert Setup("m").command() == "paceline generate --model m"

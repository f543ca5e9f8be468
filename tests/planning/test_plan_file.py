"""Plan files: what is written is read, and anything else is refused in one sentence."""

import contextlib
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.models import load
from paceline.planning.plan_file import (
    PlanRow,
    SetupPlan,
    any_kept,
    keep_plan,
    kept_plan,
    read_plan,
)
from paceline.planning.setups import Goal, Setup
from paceline.planning.toml_text import to_toml
from tests.conftest import shared

MODEL = str(shared("models", "stories260K"))


@pytest.fixture(scope="module")
def model():
    return load(MODEL)


@pytest.fixture
def plan(model):
    rows = (
        PlanRow(
            Setup(MODEL, "int8", kv_format="fp16", threads=1),
            model.fingerprint(),
            False,
            1000,
            10.5,
            11.0,
            10.0,
            12.0,
            0.1,
            0.003,
            0.001,
            "nothing else",
        ),
        PlanRow(Setup(MODEL), model.fingerprint(), True, 2000, 5.0),
    )
    return SetupPlan(MODEL, model.name, model.fingerprint(), Goal(memory=10**9, users=2), rows)


def written(folder, text):
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def test_a_plan_survives_its_file(plan, tmp_path):
    assert read_plan(written(tmp_path, plan.to_toml())) == plan
    plan.check()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "0.0.1"}, "by Paceline 0.0.1, and this is"),
        ({"fingerprint": "0" * 24, "name": "another"}, "made for another"),
    ],
)
def test_other_versions_and_models_are_refused_by_name(plan, change, said):
    with pytest.raises(RequestError, match=said):
        replace(plan, **change).check()


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"processor": "Other CPU"}, "made on Other CPU with"),
        ({"usable_cores": 999}, "with 999 cores"),
        ({"memory_gib": 1}, "other memory gib"),
    ],
)
def test_plans_of_other_machines_are_refused_by_name(plan, fact, said):
    other = replace(plan, machine={**plan.machine, **fact})
    with pytest.raises(RequestError, match=said) as caught:
        other.check()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_changed_is_refused(plan):
    other = shared("models", "TinyStories-656K")
    row = replace(plan.rows[0], setup=Setup(str(other)), fingerprint="old")
    with pytest.raises(RequestError, match="has changed since"):
        replace(plan, rows=(row,)).check()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "schema = 'paceline-plan/2'",
        "schema = 'paceline-plan/1'",
        "\x00",
        "a = " + "[" * 2000,
        "schema = 'paceline-plan/1'\nversion = 3\n[model]\npath = 'x'",
    ],
)
def test_what_is_no_plan_is_refused_in_one_sentence(tmp_path, text):
    with pytest.raises(RequestError) as caught:
        read_plan(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "plan" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "budget = -1",
        'budget = "many"',
        "budget = true",
        "format = 4",
        'drafter = "nobody"',
        'kv_format = "fp64"',
        'kv_policy = "nobody"',
        "threads = 0",
        'memory = "much"',
        "exact = 1",
        'predicted = "fast"',
        "unknown = 1",
    ],
)
def test_damaged_setups_are_refused_in_one_sentence(plan, tmp_path, line):
    name = line.partition(" ")[0]
    lines = plan.to_toml().splitlines()
    start = lines.index("[[setups]]")
    kept = [each for each in lines[start:] if not each.startswith(f"{name} ")]
    path = written(tmp_path, "\n".join([*lines[:start], "[[setups]]", line, *kept[1:]]))
    with pytest.raises(RequestError, match="damaged plan") as caught:
        read_plan(path)
    assert "\n" not in str(caught.value)


def test_missing_and_huge_files_are_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot read the plan"):
        read_plan(tmp_path / "nothing.toml")
    with pytest.raises(RequestError, match="cannot read the plan"):
        read_plan(tmp_path)
    with pytest.raises(RequestError, match="too large"):
        read_plan(written(tmp_path, "#" * (2 << 20)))


@settings(max_examples=60)
@given(st.data())
def test_no_cut_or_changed_plan_raises_anything_else(data):
    import tempfile
    from pathlib import Path

    row = PlanRow(Setup("m"), "f", True, 1, 1.0)
    text = SetupPlan("m", "n", "f", Goal(), (row,)).to_toml()
    at = data.draw(st.integers(0, len(text)))
    damaged = text[:at] + data.draw(st.sampled_from(["", "x", "\n", '"', "[", "=", "é"]))
    damaged += text[at + data.draw(st.integers(0, 5)) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        path.write_text(damaged)
        with contextlib.suppress(RequestError):
            read_plan(path)


def test_plans_are_kept_by_model_and_machine(plan, model, tmp_path, monkeypatch):
    assert not any_kept(tmp_path)
    assert kept_plan(model, tmp_path) is None
    keep_plan(plan, tmp_path)
    assert any_kept(tmp_path)
    assert kept_plan(model, tmp_path) == plan
    other = load(shared("models", "TinyStories-656K"))
    assert kept_plan(other, tmp_path) is None
    monkeypatch.setattr(
        "paceline.planning.plan_file.machine_facts", lambda: {"processor": "Other CPU"}
    )
    assert kept_plan(model, tmp_path) is None


def test_a_damaged_kept_plan_counts_as_none(plan, model, tmp_path):
    keep_plan(plan, tmp_path)
    [file] = (tmp_path / "kept").iterdir()
    file.write_text("damaged")
    assert kept_plan(model, tmp_path) is None


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.lists(st.integers(0, 9), max_size=3),
)


@given(st.dictionaries(texts, values, max_size=4), st.dictionaries(texts, values, max_size=3))
def test_toml_is_read_back_as_it_was(flat, table):
    document = {"flat": 1, "table": {**flat}, "rows": [table, flat]}
    assert tomllib.loads(to_toml(document)) == document
    assert tomllib.loads(to_toml(flat)) == flat


def test_toml_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="nan"):
        to_toml({"a": float("nan")})
    with pytest.raises(ValueError, match="TOML"):
        to_toml({"a": object()})

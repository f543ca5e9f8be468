"""`paceline plan` on a tiny model, and the verbs that take its plan."""

import tomllib

import pytest

from paceline.planning.plan_file import keep_plan, read_plan
from tests.conftest import shared

MODEL = str(shared("models", "stories260K"))
OTHER = str(shared("models", "TinyStories-656K"))


@pytest.fixture
def own_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(done, said):
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err


@pytest.fixture
def plan_file(paceline, tmp_path, own_cache_folder):
    """An unmeasured plan, with another format, threads and KV format."""
    path = tmp_path / "plan.toml"
    done = paceline("plan", MODEL, "--minutes", 0, "--exact", "--out", path)
    assert done.code == 0, done.err
    text = path.read_text()
    path.write_text(
        text.replace('format = "auto"', 'format = "int8"', 1).replace(
            'kv_format = "auto"', 'kv_format = "fp16"\nthreads = 1', 1
        )
    )
    return path


def test_a_plan_is_made_within_seconds_and_goes_on(
    paceline, tmp_path, own_cache_folder, monkeypatch
):
    monkeypatch.setattr("paceline.planning.busy_watch._TRIES", 1)  # other tests run beside it
    out, page = tmp_path / "plan.toml", tmp_path / "plan.html"
    words = ("plan", MODEL, "--minutes", 0.05, "--limit", 1, "--max-new-tokens", 4, "--out", out)
    done = paceline(*words, "--html", page, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["setups"][0]["speed"] > 0
    assert found["errors"]["largest"] >= 0
    assert tomllib.loads(out.read_text())["model"]["path"] == MODEL
    assert "<svg" in page.read_text()
    again = paceline(*words, "--json")
    assert "measuring auto\n" not in again.err
    known = paceline("generate", MODEL, "Once", "--max-new-tokens", 2)
    assert "using the plan of this machine for stories260K" in known.err


def test_without_minutes_nothing_is_measured(paceline, tmp_path, own_cache_folder):
    done = paceline("plan", MODEL, "--minutes", 0, "--out", tmp_path / "p.toml")
    assert done.code == 0
    assert "nothing was run end to end" in done.err
    plan = read_plan(tmp_path / "p.toml")
    assert plan.chosen.exact
    assert plan.chosen.speed is None


def test_generate_runs_a_plan_and_options_win(paceline, plan_file):
    words = ("generate", "--plan", plan_file, "Once", "--max-new-tokens", 3, "--json")
    found = paceline(*words).json
    assert (found["format"], found["kv_format"]) == ("int8", "fp16")
    found = paceline(*words, "--format", "auto", "--drafter", "suffix").json
    assert (found["kv_format"], found["drafter"]) == ("fp16", "suffix")
    assert found["format"] != "int8"
    assert paceline(*words, "--model", MODEL).json["format"] == "int8"


def test_chat_runs_a_plan(paceline, plan_file):
    done = paceline(
        *("chat", "--plan", plan_file, "--template", "{user}", "--max-new-tokens", 2, "--json"),
        stdin="Hello\n",
    )
    assert done.json["turns"][0]["format"] == "int8"


def test_a_plan_of_another_model_machine_or_version_is_refused(paceline, plan_file):
    words = ("generate", "--plan", plan_file, "Once")
    refused(paceline(*words, "--model", OTHER), "made for stories260K, and TinyStories-656K is")
    text = plan_file.read_text()
    plan_file.write_text(text.replace("usable_cores = ", "usable_cores = 9"))
    refused(paceline(*words), "and this is")
    plan_file.write_text(text.replace('version = "', 'version = "9'))
    refused(paceline(*words), "made by Paceline 9")
    plan_file.write_text(text[:90])
    refused(paceline(*words), "plan")


def test_a_known_plan_is_used_and_told_unless_something_else_is_requested(paceline, plan_file):
    words = ("generate", "--model", MODEL, "Once", "--max-new-tokens", 2, "--json")
    keep_plan(read_plan(plan_file))
    done = paceline(*words)
    assert done.json["format"] == "int8"
    assert "using the plan of this machine for stories260K: int8" in done.err
    for more in (("--no-known-plan",), ("--drafter", "plain"), ("--kv-format", "auto")):
        other = paceline(*words, *more)
        assert other.json["format"] != "int8"
        assert "using the plan" not in other.err
    assert "using the plan" not in paceline("generate", "--model", OTHER, "Once", "--json").err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", "much"), "--memory is 'much'"),
        (("--memory", "0"), "more than 0 bytes"),
        (("--context", "far"), "expected a number of tokens"),
        (("--context", "1"), "expected 2 or more"),
        (("--context", "1m"), "expected a number of tokens"),
        (("--context", "100k"), "sees 512"),
        (("--exact", "--loss", "0.1"), "--exact allows no loss"),
        (("--loss", "nan"), "expected a number of 0 or more"),
        (("--loss", "-1"), "expected a number of 0 or more"),
        (("--prefer", "beauty"), "expected speed or memory"),
        (("--minutes", "-1"), "--minutes is -1.0"),
        (("--minutes", "nan"), "--minutes is nan"),
        (("--minutes", "inf"), "--minutes is inf"),
        (("--drafter", "nobody"), "unknown drafter 'nobody'"),
        (("--drafter", "bild:path=x"), "may change outputs"),
        (("--for", "missing"), "cannot read the prompts"),
        (("--text", "missing"), "missing"),
        (("--judge", "'open"), "is not a command"),
        (("--checkpoint", "missing"), "missing does not exist"),
        (("--out", "no/folder.toml"), "there is no folder"),
        (("--html", "no/folder.html"), "there is no folder"),
        (("--memory", "1KB", "--minutes", "0"), "cannot hold stories260K with"),
    ],
)
def test_bad_options_are_refused(paceline, own_cache_folder, words, said):
    out = () if "--out" in words else ("--out", "not-written.toml")
    refused(paceline("plan", MODEL, *out, *words), said)


def test_what_is_no_plan_is_not_overwritten(paceline, tmp_path):
    path = tmp_path / "notes.toml"
    path.write_text("mine")
    refused(paceline("plan", MODEL, "--out", path), "is there and is no plan")
    assert path.read_text() == "mine"


def test_one_model_is_planned(paceline, tmp_path):
    two = f"{MODEL}:weight=0.5+{OTHER}:weight=0.5"
    refused(paceline("plan", two, "--out", tmp_path / "p.toml"), "a plan is of one model")


def test_checkpoints_with_other_tokens_are_refused(paceline, tmp_path):
    words = ("--checkpoint", OTHER, "--out", tmp_path / "p.toml")
    refused(paceline("plan", MODEL, *words), "has other tokens than stories260K")


def test_serve_takes_a_plan_and_settings_win(paceline, plan_file):
    words = ("serve", "--show-config", "--plan", plan_file)
    found = paceline(*words).json
    assert (found["model"], found["format"], found["threads"]) == (MODEL, "int8", 1)
    found = paceline(*words, "--format", "fp16", "--threads", 2).json
    assert (found["format"], found["threads"], found["kv_format"]) == ("fp16", 2, "fp16")
    refused(paceline(*words, "--model", OTHER), "made for stories260K")
    refused(paceline(*words, "--replicas", 2), "a plan is of one machine")
    assert paceline("serve", "--show-config", "--plan", "auto").json["plan"] == "auto"


def test_serve_uses_a_known_plan_unless_told_how_to_run(paceline, plan_file):
    keep_plan(read_plan(plan_file))
    words = ("serve", "--show-config", "--model", MODEL)
    done = paceline(*words)
    assert done.json["format"] == "int8"
    assert done.json["name"] == "stories260K"
    assert "using the plan" in done.err
    for more in (("--no-known-plan",), ("--threads", 1), ("--plan", "auto")):
        assert paceline(*words, *more).json["format"] == "auto"


def test_doctor_shows_what_a_model_can_do_here(paceline, plan_file, tmp_path):
    keep_plan(read_plan(plan_file))
    page = tmp_path / "picture.html"
    done = paceline("doctor", MODEL, "--html", page, "--json")
    assert done.code == 0, done.err
    found = done.json["model"]
    stored, *others = found["formats"]
    assert stored["format"] == "auto"
    assert stored["speed"] > 0
    assert stored["loss"] == 0
    assert set(stored["passes"]) == {"4", "8", "16"}
    assert [row["format"] for row in others if row["chosen"]] == ["int8"]
    assert all(row["speed"] is None for row in others)
    assert found["chosen"].startswith("int8")
    assert "Roofline" in page.read_text()
    assert "roofline" in paceline("doctor", "--model", MODEL).out


def test_doctor_refuses_a_picture_of_nothing(paceline, tmp_path):
    refused(paceline("doctor", "--html", tmp_path / "x.html"), "none is named")
    refused(paceline("doctor", "missing"), "missing does not exist")

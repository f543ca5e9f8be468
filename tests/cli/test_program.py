import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import paceline as package
from paceline.cli import options
from paceline.cli import serve as serve_module
from paceline.cli.app import app
from tests.conftest import shared

VERBS = ("generate", "chat", "prove", "bench", "methods", "doctor")
FULL = Path("/dev/full")
PROGRAM = [sys.executable, "-c", "from paceline.cli import main; main()"]


def heed_ctrl_c():
    """Jobs in the background of a shell start with SIGINT ignored, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*words, program=PROGRAM, **options):
    return subprocess.Popen(
        [*program, *map(str, words)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
        **options,
    )


def finish(process):
    with process:  # which closes its pipes
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()  # where it has not ended: it must not outlive its test
    assert "Traceback" not in err
    return process.returncode, out, err


def interrupt(process):
    """Press Ctrl-C, and again: Python drops one that arrives in a callback of its collector."""
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
            break
    return finish(process)


@pytest.fixture
def story():
    """Words of a run on a real model that takes a while."""
    model = shared("models", "stories260K")
    return ("generate", "Once", "--model", model, "--drafter", "plain", "--ignore-eos")


def test_help_names_every_verb_and_imports_little():
    code = "import sys; from paceline.cli import app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "paceline.cli.app" in loaded
    assert not {"torch", "numpy", "transformers", "tokenizers", "rich.table"} & loaded
    code, out, _ = finish(start("--help"))
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(paceline, verb):
    done = paceline(verb, "--help")
    assert done.code == 0
    assert "--json" in done.out


def test_every_option_is_explained_and_shared_groups_look_alike(paceline):
    words = {"EngineOptions": "Model", "ConstraintOptions": "Constraints"}
    verbs = {
        "generate": words, "chat": words, "bench": words, "prove": words,
        "complete": {"EngineOptions": "Model"}, "serve": {},
    }  # fmt: skip
    for verb, panels in verbs.items():
        shown = paceline(verb, "--help").out
        for group, title in panels.items():
            assert title in shown
            for field in fields(getattr(options, group)):
                flag = "format" if field.name == "weight_format" else field.name
                assert f"--{flag.replace('_', '-')}" in shown.partition(title)[2]
    root = typer.main.get_command(app)
    for name, verb in root.commands.items():
        for parameter in verb.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_generate_tells_where_lexical_controls_are(paceline):
    shown = " ".join(paceline("generate", "--help").out.split())
    assert "Lexical controls: --keywords" in shown
    assert "`letters`, `sounds` and `monitor` by --sampler" in shown


def test_no_verb_shows_the_help(paceline):
    assert paceline().out == paceline("--help").out


def test_version(paceline):
    assert paceline("--version").out == f"paceline {package.__version__}\n"


def test_methods_lists_what_is_registered(paceline):
    done = paceline("methods", "--json")
    rows = {(row["family"], row["name"]): row for row in done.json["methods"]}
    min_p = rows["control", "min_p"]["settings"]
    assert [(each["name"], each["type"], each["default"]) for each in min_p] == [
        ("p", "float", 0.05)
    ]
    assert min_p[0]["doc"]
    assert rows["drafter", "plain"]["exactness"] == "exact"
    assert all(
        {"needs", "source", "catalogue", "summary", "hidden"} <= set(r) for r in rows.values()
    )
    shown = paceline("methods").out
    assert "min_p" in shown
    assert "chunked prefill" in shown
    assert "hostile" not in shown


def test_methods_of_one_family_and_one_method(paceline):
    shown = paceline("methods", "drafters").out
    assert "lookup" in shown
    assert "min_p" not in shown
    one = paceline("methods", "drafter", "trie").out
    assert one.startswith("drafter lookahead_trie\n")
    assert "catalogue 42: served whole" in one
    assert "capacity (int, default 262144): " in one
    feature = paceline("methods", "features", "chunked prefill").out
    assert "catalogue 353: served in part; missing: chunks of equal size" in feature
    assert "unknown family 'drofter'; did you mean drafter" in paceline("methods", "drofter").err
    assert "unknown drafter 'lokup'" in paceline("methods", "drafter", "lokup").err
    assert "unknown feature 'x'" in paceline("methods", "feature", "x").err


def test_methods_without_torch_are_listed_as_such():
    code = """if True:
        import sys
        sys.modules["torch"] = None
        import importlib.util as util
        real = util.find_spec
        util.find_spec = lambda name, *more: None if name == "torch" else real(name, *more)
        from paceline.cli import main
        sys.argv = ["paceline", "methods", "--json"]
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    rows = json.loads(done.stdout)["methods"]
    assert {"medusa", "lookup"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["available"] == ("torch" not in row["needs"]), row
    lacking = {row["family"] for row in rows if not row["available"]}
    assert {"head", "attention pattern"} <= lacking


def test_doctor_says_what_the_machine_offers(paceline, monkeypatch):
    from paceline.measuring import bandwidth

    monkeypatch.setattr(
        bandwidth, "measure_bandwidth", lambda threads: bandwidth.Bandwidth(2e9, 1 << 28, 2)
    )
    found = paceline("doctor", "--json").json
    assert found["machine"]["usable_cores"] == bandwidth.usable_cores()
    assert found["versions"]["python"] == sys.version.split()[0]
    assert re.fullmatch(r"[0-9a-f]{12}\+?|None", str(found["versions"]["commit"]))
    assert found["bandwidth"]["bytes_per_second"] == 2e9
    assert "2.0 GB/s" in paceline("doctor").out


def test_an_unknown_verb_or_option_is_one_sentence(paceline):
    for words in (("generat",), ("--nope",), ("doctor", "extra")):
        done = paceline(*words)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)


# A program whose generation waits after 40 passes, until it is interrupted.
WAITING = """if True:
    import time
    from paceline.cli import main
    from paceline.decoding.session import Session
    accept, passes = Session.accept, []

    def accept_forty(*args):
        passes.append(1)
        if len(passes) > 40:
            time.sleep(1000)
        return accept(*args)

    Session.accept = accept_forty
    main()
"""


def test_ctrl_c_keeps_the_text_and_exits_with_130(story):
    words = (*story, "--max-new-tokens", 500)
    process = start(*words, program=[sys.executable, "-c", WAITING])
    first = process.stdout.read(20)
    code, rest, err = interrupt(process)
    assert code == 130
    assert first.strip()
    assert rest.endswith("\n")
    assert "; interrupted" in err


def test_ctrl_c_while_loading_exits_with_130(paceline, monkeypatch):
    def load(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.lm.LM", load)
    done = paceline("generate")
    assert (done.code, done.out, done.err) == (130, "", "paceline: interrupted\n")
    assert paceline("generate", "--json").json == {"error": "interrupted"}


def test_json_of_a_real_run_is_one_document(story):
    words = ("--engine", "reference", "--max-new-tokens", 12, "--json", "--check")
    code, out, err = finish(start(*story, *words))
    assert code == 0
    found = json.loads(out)
    assert found["new_tokens"] == found["passes"] == 12
    assert found["check"]["identical"]
    assert found["engine"] == "reference"
    assert "identical to plain decoding" in err


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [("methods", "--json"), ("methods",), ("doctor", "--help")])
def test_a_full_disk_is_one_sentence(words):
    with FULL.open("w") as full:
        code, _, err = finish(start(*words, stdout=full))
    assert code == 2
    assert err.endswith(": No space left on device\n")
    assert err.count("\n") == 1


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_messages_that_nobody_can_read_change_nothing():
    with FULL.open("w") as full:
        words = [*PROGRAM, "generate", "--json", "--max-new-tokens", "3"]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["new_tokens"] == 3


@pytest.mark.parametrize(
    "words", [("methods",), ("--version",), ("--help",), ("load-test", "--help")]
)
def test_a_reader_that_went_away_ends_the_program_quietly(words):
    read, write = os.pipe()
    os.close(read)
    code, _, err = finish(start(*words, stdout=write))
    os.close(write)
    assert (code, err) == (141, "")


@pytest.mark.parametrize(
    ("closing", "words", "code", "said"),
    [
        (">&-", ("methods",), 2, "cannot write to standard output: Bad file descriptor"),
        (">&-", ("methods", "--json"), 2, "cannot write to standard output: Bad file descriptor"),
        (">&-", ("generate", "--help"), 2, "Bad file descriptor"),
        ("<&-", ("generate", "-"), 2, "the prompt is empty"),
        ("<&-", ("chat", "--template", "{user}"), 0, ""),
        ("2>&-", ("--version",), 0, ""),
        ("<&- >&- 2>&-", ("--version",), 2, ""),
    ],
)
def test_a_stream_that_the_caller_closed_is_no_crash(closing, words, code, said):
    line = ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *PROGRAM, *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_a_terminal_without_unicode_still_gets_text():
    code, out, _ = finish(start("methods", env={**os.environ, "PYTHONIOENCODING": "ascii"}))
    assert code == 0
    assert "min_p" in out


def test_earlier_names_of_verbs_and_options_are_understood_and_hidden(paceline):
    assert "Tokenise a corpus" in paceline("index", "--help").out
    assert "Load an OpenAI-compatible server" in paceline("load", "--help").out
    shown = paceline("--help").out
    assert "index-corpus" in shown
    assert " index " not in shown
    assert "--token-budget" in paceline("tune-sampling", "x", "--budget", "0").err


@pytest.mark.parametrize("verb", ["chat", "serve", "batch", "warm", "bench", "prove"])
def test_the_model_is_an_argument_or_an_option(paceline, verb):
    shown = paceline(verb, "--help").out
    assert "MODEL" in shown
    assert "--model" in shown


def test_two_models_are_refused(paceline, tmp_path):
    words = ("prove", "one", "--model", "two", "--prompts", tmp_path)
    assert "the model is 'one' and --model 'two'; give one" in paceline(*words).err
    assert "no model is named" in paceline("bench", "--prompts", tmp_path).err


def test_verbs_are_in_panels_and_every_setting_of_the_server_too(paceline):
    shown = paceline("--help").out
    for panel in ("Generate", "Serve", "Prepare", "Measure", "About"):
        assert f"─ {panel} ─" in shown
    assert "─ Cluster ─" in paceline("serve", "--help").out
    placed = [name for names in serve_module._PANELS.values() for name in names]
    assert sorted(placed) == sorted(serve_module.known.names())

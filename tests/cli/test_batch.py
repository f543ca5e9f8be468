import json
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from paceline.cli import batch
from paceline.cli.options import DraftOptions, EngineOptions
from paceline.serving.batch import BatchSettings

LINE = {"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True, "temperature": 0.9}


def rows(path):
    """Output lines without what changes from run to run."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for row in found:
        if row["response"]:
            del row["response"]["body"]["created"], row["response"]["body"]["paceline"]
            del row["response"]["body"]["usage"]["prompt_tokens_details"]
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    bodies = [LINE | {"seed": seed, "custom_id": f"c{seed}"} for seed in range(40)]
    bodies[7] = {"oops": 1}
    path.write_text("\n".join(map(json.dumps, bodies)))
    return path


def test_a_batch_that_is_killed_goes_on_where_it_stopped(paceline, source, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    done = paceline("batch", source, whole, "--json")
    assert done.code == 1  # a line failed
    assert (done.json["lines"], done.json["failed"], done.json["before"]) == (40, 1, 0)

    # After four lines the process waits for its end, however fast it is.
    code = """if True:
        import time
        from paceline.cli import main
        from paceline.serving.output_journal import OutputJournal
        add = OutputJournal.add

        def add_four(journal, number, line):
            add(journal, number, line)
            while journal.lines == 4:
                time.sleep(1)

        OutputJournal.add = add_four
        main()
    """
    words = [sys.executable, "-c", code, "batch", source, killed, "--max-running", "1"]
    part = tmp_path / "killed.jsonl.part"
    with subprocess.Popen([*words, "--budget", "0"], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (
            part.exists() and part.read_bytes().count(b"\n") == 4
        ):
            time.sleep(0.002)
        process.kill()
    lines = part.read_bytes().count(b"\n")
    assert lines == 4
    assert not killed.exists()
    done = paceline("batch", source, killed, "--json")
    assert (done.json["lines"], done.json["failed"], done.json["before"]) == (40, 1, lines)
    assert rows(killed) == rows(whole)
    assert [row["custom_id"] for row in rows(whole)][:9:2] == ["c0", "c2", "c4", "c6", "c8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "killed.jsonl",
        "whole.jsonl",
    ]


def test_a_batch_without_mistakes_ends_with_0(paceline, tmp_path):
    (tmp_path / "in").write_text(json.dumps({"prompt": "Once"}))
    done = paceline("batch", tmp_path / "in", tmp_path / "out", "--max-new-tokens", 4)
    assert done.code == 0
    assert "1 lines, 0 with an error; 4 tokens" in done.err
    assert rows(tmp_path / "out")[0]["response"]["body"]["usage"]["completion_tokens"] == 4


def test_what_cannot_be_is_refused(paceline, source, tmp_path):
    done = paceline("batch", tmp_path / "none", tmp_path / "out")
    assert (done.code, "it is not a file" in done.err) == (2, True)
    (tmp_path / "out").write_text("mine")
    done = paceline("batch", source, tmp_path / "out")
    assert (done.code, "exists; remove it" in done.err) == (2, True)
    (tmp_path / "empty").write_text("\n\n")
    done = paceline("batch", tmp_path / "empty", tmp_path / "new")
    assert (done.code, "has no line" in done.err) == (2, True)
    done = paceline("batch", source, tmp_path / "no" / "new")
    assert (done.code, "there is no folder" in done.err) == (2, True)


def test_lines_without_sampling_of_their_own_get_that_of_the_options(paceline, tmp_path):
    def texts(line, *words):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text(json.dumps({"prompt": "Once", "max_tokens": 20, "seed": 3} | line))
        assert paceline("batch", source, out, *words).code == 0
        answer = rows(out)[0]["response"]["body"]["choices"][0]["text"]
        out.unlink()
        return answer

    given = {"temperature": 1.5, "top_p": 0.9, "top_k": 7, "repetition_penalty": 1.3}
    words = ("--temperature", 1.5, "--top-p", 0.9, "--top-k", 7, "--repetition-penalty", 1.3)
    assert texts({}, *words) == texts(given) != texts({})
    assert texts({"temperature": 0, "top_k": 5}, "--temperature", 1.5, "--top-k", 1) == texts(
        {"temperature": 0, "top_k": 5}
    )
    for sampler in ("top_k=5", {"top_k": 5}):  # each default holds for what a line does not say
        assert texts({"sampler": sampler}, *words) == texts(given | {"top_k": 5})
    assert texts({"sampler": "temperature=0"}, *words) == texts(given | {"temperature": 0})
    source = tmp_path / "in.jsonl"
    assert "top_p is 7" in paceline("batch", source, tmp_path / "o", "--top-p", 7).err


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ({"kv_policy": "h2o"}, {}),
        ({"attention": "lm_infinite"}, {}),
        ({"weight_format": "int8"}, {}),
        ({}, {"seed": 1}),
        ({}, {"sampling": {"top_k": 3}}),
    ],
)
def test_a_job_with_other_outputs_is_another_job(engine, settings):
    def job(engine, settings):
        made = BatchSettings("tiny", **settings)
        options = (EngineOptions(**engine), DraftOptions())
        return batch._job("digest", "model", [], made, *options)

    assert job(engine, settings) != job({}, {})


def test_a_job_depends_on_every_option_of_the_engine_that_changes_answers():
    def job(**engine):
        options = (EngineOptions(**engine), DraftOptions())
        return batch._job("digest", "model", [], BatchSettings("tiny"), *options)

    same = {"engine", "device", "threads", "weights_memory"}  # up to rounding
    for each in fields(EngineOptions):
        assert (job(**{each.name: "2"}) == job()) == (each.name in same), each.name

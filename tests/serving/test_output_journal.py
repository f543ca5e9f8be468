"""Output that survives any end of its process."""

import json
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.serving.output_journal import OutputJournal

JOB = {"input": "abc", "seed": 0}


def line(text="x", error=None):
    return {"custom_id": text, "error": error}


def read(path):
    return [json.loads(each) for each in path.read_text().splitlines()]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_is_gone_on_from(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "out.jsonl"
    lines = data.draw(st.lists(st.text(), min_size=1, max_size=6))
    bad = data.draw(st.sets(st.integers(0, 5)))
    numbers = [2 * at + 1 for at in range(len(lines))]  # as where blank lines are between
    errors = [{"code": "x"} if at in bad else None for at in range(len(lines))]
    part = path.with_name("out.jsonl.part")
    for _ in range(data.draw(st.integers(1, 4))):
        with closing(OutputJournal(path, JOB)) as journal:
            left = [at for at in range(len(lines)) if numbers[at] > journal.done]
            assert len(left) == len(lines) - journal.lines
            for at in left[: data.draw(st.integers(0, len(left)))]:
                journal.add(numbers[at], line(lines[at], errors[at]))
        assert part.exists() == bool(journal.lines)
        if not part.exists():
            continue
        whole = part.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        part.write_bytes(whole[:cut] + data.draw(st.sampled_from([b"", b"\0\0\0", b"{}\n", b"7"])))
    journal = OutputJournal(path, JOB)
    for at, number in enumerate(numbers):
        if number > journal.done:
            journal.add(number, line(lines[at], errors[at]))
    assert journal.failed == sum(error is not None for error in errors)
    journal.finish()
    assert [each["custom_id"] for each in read(path)] == lines
    assert [each["id"] for each in read(path)] == [f"batch_req_{number}" for number in numbers]
    assert [each.name for each in path.parent.iterdir()] == ["out.jsonl"]


def test_another_job_is_not_mixed_in(tmp_path):
    path = tmp_path / "out.jsonl"
    journal = OutputJournal(path, JOB)
    journal.add(1, line())
    journal.close()
    with pytest.raises(RequestError, match="another seed; remove it to start over"):
        OutputJournal(path, JOB | {"seed": 1})
    path.with_name("out.jsonl.job").write_text("{")
    with pytest.raises(RequestError, match="another input and seed"):
        OutputJournal(path, JOB)
    assert len(read(path.with_name("out.jsonl.part"))) == 1


def test_what_has_not_begun_may_be_another_job(tmp_path):
    OutputJournal(tmp_path / "out", JOB).close()
    OutputJournal(tmp_path / "out", JOB | {"seed": 1}).close()


def test_two_do_not_write_at_once(tmp_path):
    journal = OutputJournal(tmp_path / "out", JOB)
    with pytest.raises(RequestError, match="another process is writing"):
        OutputJournal(tmp_path / "out", JOB)
    journal.close()


def test_what_exists_stays(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(RequestError, match="exists; remove it"):
        OutputJournal(path, JOB)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert path.read_text() == "mine"

import json
import os
from pathlib import Path

import pytest

from paceline.cli.output import check_target, save
from paceline.errors import PacelineError


def test_a_document_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "report.json"
    save(path, {"a": 1})
    save(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    save(path, {"a": 1})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PacelineError, match="No space left on device"):
        save(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_targets_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    check_target(None)
    check_target(tmp_path / "new.json")
    with pytest.raises(PacelineError, match="there is no folder"):
        check_target(tmp_path / "missing" / "new.json")
    with pytest.raises(PacelineError, match="it is not a file"):
        check_target(tmp_path)
    with pytest.raises(PacelineError, match="it is not a file"):
        check_target(Path(os.devnull))

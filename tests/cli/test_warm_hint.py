"""What `paceline chat` says of warm starts."""

import shlex
from pathlib import Path

import pytest

import paceline
from paceline.cli.app import app
from paceline.cli.warm_hint import hint_warm_start
from paceline.lm import LM
from tests.conftest import shared
from tests.serving.api.conftest import TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model, with a chat template."""
    made = tmp_path_factory.mktemp("a chat model")
    for file in (Path(paceline.__file__).parent / "embedded").iterdir():
        (made / file.name).symlink_to(file)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


def test_it_is_said_once_and_names_a_command_that_works(folder, tmp_path, capsys):
    from typer.testing import CliRunner

    with LM(folder) as lm:
        hint_warm_start(lm, str(folder), tmp_path)
        said = capsys.readouterr().err
        hint_warm_start(lm, str(folder), tmp_path)
    assert capsys.readouterr().err == ""
    program, *words = shlex.split(said.partition(": ")[2].partition(" makes ")[0])
    assert program == "paceline"
    assert CliRunner().invoke(app, [*words, "--tokens", "60"]).exit_code == 0
    with LM(folder) as warm:
        assert warm.draft_target.trace is not None
        hint_warm_start(warm, None, tmp_path / "other")
    assert capsys.readouterr().err == ""


def test_it_is_left_out_where_it_is_of_no_use(folder, tmp_path, capsys):
    for path, options in (
        (folder, {"drafter": "plain"}),
        (folder, {"drafter": "blend:warm=false"}),
        (shared("models", "stories260K"), {}),  # no chat model
    ):
        with LM(path, **options) as lm:
            hint_warm_start(lm, None, tmp_path)
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    with LM(folder) as lm:
        hint_warm_start(lm, None, tmp_path / "file")
    assert capsys.readouterr().err == ""

import json

import pytest
from typer.testing import CliRunner

from paceline.cli.app import app
from tests.measuring.toy_lm import ToyLM


class Result:
    """What a run of the command line gave."""

    def __init__(self, result):
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def paceline():
    """Runs the command line in this process."""

    def run(*words, stdin=None):
        return Result(CliRunner().invoke(app, [str(word) for word in words], input=stdin))

    return run


@pytest.fixture
def toy(monkeypatch):
    """Every verb gets this toy model, whatever it asks for."""
    lm = ToyLM()
    monkeypatch.setattr("paceline.lm.LM", lambda *words, **options: lm)
    return lm


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "Once upon"}, {"turns": ["One", "Two"], "category": "qa"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path

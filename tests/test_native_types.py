"""The types of the compiled module are those that it was built with."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "stubs.py"


def test_the_stub_is_up_to_date():
    script = runpy.run_path(str(SCRIPT))
    assert script["STUB"].read_text() == script["stub"](), "run `python scripts/stubs.py`"


def test_the_check_sees_a_stale_stub(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(SCRIPT))
    stale = tmp_path / "_native.pyi"
    stale.write_text(script["stub"]().replace("k: int", "k: str", 1))
    monkeypatch.setattr(sys, "argv", ["stubs.py", "--check"])
    monkeypatch.setitem(script["main"].__globals__, "STUB", stale)
    assert script["main"]() == 1
    assert "out of date" in capsys.readouterr().err

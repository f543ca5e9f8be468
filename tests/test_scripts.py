import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.parametrize("name", ["test.sh", "demo.sh", "kernels.sh", "wheel.sh"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_printed_and_nothing_is_done(name, flag, tmp_path):
    for file in (name, "environment.sh"):
        (tmp_path / file).write_text((SCRIPTS / file).read_text())
    words = ["bash", tmp_path / name, flag]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: bash scripts/{name}")
    assert "set -euo" not in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["environment.sh", name])

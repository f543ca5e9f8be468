import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "docs.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_worked_example_of_a_drafter_runs():
    block = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)[0]
    source = block.replace('register("echo", ', 'register("echo-example", hidden=True, exactness=')
    scope = {"__name__": "tests.echo_example"}
    sys.modules["tests.echo_example"] = sys.modules[__name__]
    exec(compile(source, "CONTRIBUTING.md", "exec", dont_inherit=True), scope)
    import numpy as np

    from paceline.drafters.base import Target

    drafter = scope["Echo"](most=2).build(Target(10))
    assert drafter.propose(np.array([3, 7], np.int32), 8).tokens.tolist() == [7, 7, 7]

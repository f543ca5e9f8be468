import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.models.known_models import KNOWN_MODELS
from tests.conftest import shared
from tests.real_models import real_file

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


def test_the_site_builds_without_warnings(tmp_path):
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").exists()


RUN = [
    ROOT / "README.md",
    ROOT / "docs" / "quickstart.md",
    *sorted((ROOT / "docs/guides").glob("*")),
]
BLOCK = re.compile(r"(<!-- not run: (.+?) -->\n)?```(sh|python)\n(.*?)```", re.S)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path):
    model = shared("models", "stories260K")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model)
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    if "smollm2-135m" in page.read_text():
        put = tmp_path / "cache/paceline/models/smollm2-135m" / KNOWN_MODELS["smollm2-135m"].file
        put.parent.mkdir(parents=True)
        put.symlink_to(real_file("smollm2-135m"))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "paceline"
    program.write_text(f"#!{sys.executable}\nfrom paceline.cli import main\nmain()\n")
    program.chmod(0o755)
    env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
    for _, reason, kind, block in BLOCK.findall(page.read_text()):
        if reason:
            continue
        run = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
        text = block.replace("pip install .", ": pip install .")  # it is installed
        done = subprocess.run(
            [*run, text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-800:]}\n{done.stderr[-1500:]}"

"""Every script under `benchmarks/` runs to its end, on tiny models and in seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import GGUFFormat
from tests.conftest import shared

ROOT = Path(__file__).parent.parent
SMALL = "{models}/stories260K"

# The shortest arguments that run every part of a script that needs nothing to be installed.
SMOKE = {
    "kernels.py": "--shape tiny --rounds 1 --threads 1 --megabytes 1",
    "activations.py": "{gguf} --rounds 1",
    "step.py": "--shape tiny --format int8 --repeat 1 --sizes 1 4 --profile",
    "packed.py": "--shape tiny --group 32 --repeat 1 --threads 1",
    "shared_prefix.py": "--shape tiny --context 70 --sequences 2 --nodes 1 --repeat 1",
    "peers.py": "--model {models}/stories260K --bits 16 --rounds 1 --prompt 16 --peer transformers",
    "end_to_end.py": SMALL + " --count 2 --format int8",
    "drafters.py": SMALL + " --documents 0:1 --drafters recycle blend --budgets 4",
    "letters.py": SMALL + " --outputs 1 --dictionary {words}",
    "grammars.py": SMALL + " --schemas 8 --drafter blend",
    "head_screen.py": SMALL + " --drafter plain --tokens 4 --rounds 1",
    "heads.py": SMALL + " --formats int8 --sizes 8",
    "guided.py": SMALL + " --count 1 --rounds 1 --budget 4",
    "pearl.py": SMALL + " {models}/stories260K --count 1 --budget 4 --only-waits",
    "blend_prior.py": SMALL + " --limit 1 --new 8 --header {header}",
    "completions.py": SMALL + " --count 1 -n 2 --length 4",
    "first_token.py": SMALL + " --sizes 20 --rounds 3",
    "drafting.py": SMALL + " --requests 1 --passes 4",
    "lossless.py": SMALL + " --rounds 1 --threads 1 --pruned 0.5",
    "formats.py": SMALL + " --documents 2",
    "proposals.py": SMALL + " --lessons 1 --drafters recycle --budgets 4 --requests 1 --passes 4",
    "predictions.py": SMALL + " --prompts 1 --budgets 4",
    "watermarks.py": SMALL + " --texts 2 --plain 2 --tokens 12 --resamples 9",
    "soak.py": "--minutes 0.05 --users 1 --model {models}/stories260K",
    "serving.py": SMALL + " --rounds 1 --requests 1 --tokens 4 --long 2 --part users stall prefix",
}
# Scripts that need what CI does not install, with the reason.
NEEDS = {
    "grammar_libraries.py": "xgrammar",
    "harness.py": "lm-eval; tests/measuring/test_harness.py runs its parts where that is",
    "keywords.py": "a hidden Markov model, which takes minutes to distil",
    "wheel_server.py": "the wheel xllamacpp",
}


def scripts():
    return {p.name for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()}


def test_every_script_has_its_smoke_arguments_or_a_reason():
    assert scripts() == set(SMOKE) | set(NEEDS)


@pytest.mark.parametrize("script", SMOKE)
def test_it_runs_to_its_end(script, tmp_path):
    dictionary = tmp_path / "words.txt"
    dictionary.write_text("DAY  D EY1\nPLAY  P L EY1\nTHE  DH AH0\nONCE  W AH1 N S\n")
    paths = {"words": dictionary, "header": tmp_path / "prior.hpp", "gguf": tmp_path / "a.gguf"}
    if "{gguf}" in SMOKE[script]:
        model = load(shared("models") / "stories260K")
        GGUFExport(model, GGUFFormat("Q8_0", "Q8_0")).write(paths["gguf"])
    words = SMOKE[script].format(models=shared("models"), **paths).split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *words],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()

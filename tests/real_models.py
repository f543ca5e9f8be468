"""Real, general models for tests marked `real` and `real_gemma`: where their GGUF files are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paceline.models.known_models import KNOWN_MODELS

# Paths that name files which are elsewhere, by model.
VARIABLES = {
    "smollm2-135m": "PACELINE_TEST_SMOLLM2",
    "gemma3-270m": "PACELINE_TEST_GEMMA3",
}
# Read when this is imported: a test's own cache is empty.
_PULLED = {name: KNOWN_MODELS[name].path for name in VARIABLES}


def real_file(name: str) -> Path:
    """The GGUF file of a model; the test is skipped by its name where it is missing."""
    path = Path(os.environ.get(VARIABLES[name]) or _PULLED[name])
    if not path.exists():
        pytest.skip(f"{name} is not here; `paceline pull {name}`, or set {VARIABLES[name]}")
    return path

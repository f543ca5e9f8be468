"""SmolLM2 and Gemma: their files, and the same in transformers, dequantised by other code."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from paceline import LM
from paceline.models.known_models import KNOWN_MODELS, KnownModel
from tests.conftest import shared
from tests.real_models import real_file

BOTH = (
    pytest.param("smollm2-135m", marks=pytest.mark.real),
    pytest.param("gemma3-270m", marks=pytest.mark.real_gemma),
)


@pytest.fixture(scope="module", params=BOTH)
def model(request: pytest.FixtureRequest) -> KnownModel:
    """Each model in turn."""
    return KNOWN_MODELS[request.param]


@pytest.fixture(scope="module")
def path(model: KnownModel) -> Path:
    """The model's file."""
    return real_file(model.name)


@pytest.fixture(scope="module")
def lm(path: Path) -> Iterator[LM]:
    """The file in our native engine, each tensor in its own bits."""
    with LM(path, threads=2) as made:
        yield made


@pytest.fixture(scope="module")
def oracle(path: Path) -> transformers.PreTrainedModel:
    """The file in transformers: dequantised to fp32 by the gguf package."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    ).eval()


@pytest.fixture(scope="session")
def wikitext() -> str:
    """The beginning of Wikitext-2's validation set."""
    with gzip.open(shared("data", "wikitext-2", "valid.tokens.txt.gz"), "rt") as file:
        return file.read(4000)

"""What every test may ask for: the real checkpoints, read in place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# No example is timed: speed is not for tests. A change lands or not by the same examples each time
# (scripts/test.sh); a plain `pytest` looks for new ones.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("untimed")

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL_MODELS = (
    "stories260K",
    "TinyStories-656K",
    "bitstories-1M",
    "bitstories-3M",
    "tinystories-instruct-3m-chat",
)

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny`

pytest_plugins = ["tests.strict_skips"]


def shared(*parts: str) -> Path:
    """A path below ../shared; the test is skipped by name where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.relative_to(SHARED.parent)} is not here")
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cost curves and warm starts of the user are left alone, and change no test.

    Nor do servers warm themselves while tests leave them idle, which would take a core.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_SERVE_WARM", "false")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=REAL_MODELS)
def real_model(request: pytest.FixtureRequest) -> Path:
    """The folder of each real checkpoint in turn."""
    return shared("models", request.param)

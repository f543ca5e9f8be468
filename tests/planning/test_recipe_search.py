"""Recipes are tried from the smallest on, until one loses little enough."""

import numpy as np
import pytest

from paceline.compress.calibrate import Calibration
from paceline.errors import RequestError
from paceline.measuring.quality import text_windows
from paceline.models import load
from paceline.planning.recipe_search import RecipeSearch
from tests.conftest import shared

TEXT = "Once upon a time there was a little girl named Lily. She liked to play outside. " * 12


@pytest.fixture(scope="module")
def model():
    return load(shared("models", "stories260K"))


def search(model, out, target, recipes=("rtn:bits=2,group=64", "rtn:bits=6,group=32")):
    windows = text_windows(model.tokenizer, TEXT, 96, 3)
    return RecipeSearch(model, out, target, windows, recipes=recipes)


def texts(recipe):
    return Calibration(np.arange(32, dtype=np.int64)[None], "numbers")


def test_the_first_recipe_that_loses_little_enough_is_kept(model, tmp_path):
    out = tmp_path / "small"
    found = search(model, out, 0.1).run(texts)
    assert [name for name, _ in found.trials] == ["rtn:bits=2,group=64", "rtn:bits=6,group=32"]
    assert found.trials[0][1] > 0.1 >= found.trials[1][1]
    assert found.job.out == out
    assert load(out).weights["layers.0.q"].bits == 6
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_search_goes_on_where_it_was(model, tmp_path, monkeypatch):
    out, scored = tmp_path / "small", []
    kept = RecipeSearch._score

    def score(self, path):
        scored.append(path.name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return kept(self, path)

    monkeypatch.setattr(RecipeSearch, "_score", score)
    recipes = ("rtn:bits=2,group=64", "rtn:bits=2,group=32", "rtn:bits=6,group=32")
    with pytest.raises(KeyboardInterrupt):
        search(model, out, 0.1, recipes).run(texts)
    assert not out.exists()
    scored.clear()
    found = search(model, out, 0.1, recipes).run(texts)
    assert len(scored) == 2  # the last recipe and the source
    assert len(found.trials) == 3


def test_a_target_that_nothing_reaches_is_told(model, tmp_path):
    with pytest.raises(RequestError, match=r"no recipe of the search loses at most 1e-09"):
        search(model, tmp_path / "small", 1e-9, ("rtn:bits=2,group=64",)).run(texts)
    assert not list(tmp_path.iterdir())

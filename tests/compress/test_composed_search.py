"""Searches whose recipe has more than levels: recovery of shapes, transforms, tuners."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.cli.budget import budget_search
from paceline.compress.budget.around import split_around
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError
from paceline.lm import LM
from paceline.models import load
from tests.compress.interruption import run_again
from tests.compress.test_structure import compress, loss, source, texts  # noqa: F401

ZIPLM = "ziplm:trials=6,tokens=160"
RECOVER = "recover:tokens=2000,rank=4"
COMPOSED = f"attention_drop+layer_drop+{RECOVER}+awq+gptq:group=32,bits=4"
HEAD = "rtn:bits=8,group=32"


def search_of(model, out, budget, recipe, head=HEAD, allocate=ZIPLM):
    return budget_search(model, out, recipe, head, False, budget, allocate, 1)


@pytest.mark.parametrize(
    ("text", "around", "rest"),
    [
        ("gptq:group=32", ((), (), ()), "gptq:group=32"),
        ("awq+gptq|awq + rtn:bits=8", ((), ("awq",), ()), "gptq|rtn:bits=8"),
        (
            "recover:rank=2+teq+gptq+block_ap:steps=1|recover:rank=2+keep",
            (("recover:rank=2",), ("teq",), ("block_ap:steps=1",)),
            "gptq|keep",
        ),
        ("recover", (("recover",), (), ()), "keep"),
    ],
)
def test_what_is_around_the_levels_is_told_from_them(text, around, rest):
    found, left = split_around(text, True)
    assert (found.structures, found.transforms, found.tuners) == around
    assert left == rest


def test_recipes_have_what_there_is_work_for():
    around, _ = split_around("recover+awq+gptq+perp", True)
    assert around.recipe("shape:mlp=8", "gptq") == "shape:mlp=8+recover+awq+gptq+perp"
    assert around.recipe("shape:mlp=8", "keep") == "shape:mlp=8+recover"
    assert around.recipe("", "gptq") == "awq+gptq+perp"
    assert around.recipe("", "keep") == "keep"
    assert (
        around.note("awq+gptq") == " The recipe has awq, too, which these divergences are without."
    )
    assert not around.note("gptq")


def test_structure_recovery_and_four_bits_are_found_in_one_go(source, tmp_path):  # noqa: F811
    search = search_of(source, tmp_path / "out", "bytes=150KB", COMPOSED)
    found = search.find(texts(source))
    steps = found.recipe.steps
    assert [each.name for each in steps.structures] == ["shape", "recover"]
    assert [each.name for each in steps.transforms] == ["awq"]
    assert "The recipe has recover:tokens=2000,rank=4, awq, too" in found.note
    job = CompressionJob(source, tmp_path / "out", found.recipe)
    assert job.run(texts(source)).total <= 150_000
    assert [note.split(" ")[0] for note in job.notes[:2]] == ["shape", "recover"]
    bare = CompressionJob(
        source, tmp_path / "bare", parse_recipe(steps.text.replace(f"{RECOVER}+", ""), HEAD)
    )
    bare.run(texts(source))
    made = load(tmp_path / "out")
    assert loss(source, made) < 0.7 * loss(source, load(tmp_path / "bare"))
    file = tmp_path / "recipe.toml"
    file.write_text(found.toml)
    CompressionJob(source, tmp_path / "again", parse_recipe(str(file))).run(texts(source))
    again = load(tmp_path / "again")
    for name in made.weights:
        assert np.array_equal(made.weights.dense(name), again.weights.dense(name)), name
    with (
        LM(tmp_path / "out", threads=1, drafter="plain", budget=1) as plain,
        LM(tmp_path / "out", threads=1, drafter="blend", budget=6) as drafting,
    ):
        answers = [
            lm.generate("Once", max_new_tokens=20, temperature=0).tokens for lm in (plain, drafting)
        ]
    assert answers[0] == answers[1]


def test_a_composed_search_that_is_interrupted_in_its_recovery_goes_on(
    source,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def run(out):
        search = search_of(source, out, "bytes=150KB", COMPOSED.replace("2000", "800"))
        found = search.find(texts(source))
        CompressionJob(source, out, found.recipe).run(texts(source))
        return found

    whole = run(tmp_path / "whole")
    again, steps = run_again(monkeypatch, lambda: run(tmp_path / "out"))
    assert again == whole
    assert steps == 6 + 10 - 5
    one, other = load(tmp_path / "whole"), load(tmp_path / "out")
    for name in one.weights:
        assert np.array_equal(one.weights.dense(name), other.weights.dense(name)), name


def test_transforms_and_tuners_go_with_levels_of_matrices(source, tmp_path):  # noqa: F811
    recipe = "awq+rtn:group=32+perp:tokens=400"
    search = search_of(
        source, tmp_path / "out", "bytes=170KB", recipe, allocate="ziplm:trials=4,tokens=80"
    )
    found = search.find(texts(source))
    assert found.recipe.rules
    assert found.recipe.steps.text.startswith("awq+rtn:bits=")
    assert found.recipe.steps.text.endswith("+perp:tokens=400")
    job = CompressionJob(source, tmp_path / "out", found.recipe)
    assert job.run(texts(source)).total <= 170_000


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("recover+gptq:group=32", "recover trains what structures left"),
        ("flap+gptq:group=32", "flap changes what whole blocks store"),
        ("flatquant+gptq:group=32", "flatquant changes what whole blocks store"),
        ("gptq:group=32+llm_qfa", "llm_qfa changes what whole blocks store"),
        ("awq+squeezellm:bits=3|squeezellm:bits=4", "changes these; leave one of them out"),
        ("narrow+recover+wanda+rtn:bits=4+block_ap", "would fill the zeros"),
    ],
)
def test_what_cannot_be_around_levels_is_refused_before_any_work(source, tmp_path, recipe, words):  # noqa: F811
    with pytest.raises(MethodError, match=words):
        search_of(source, tmp_path / "out", "bytes=150KB", recipe)

"""`paceline compress`: whole runs, interrupted ones, and what is refused."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch

from paceline.compress import job as compression
from paceline.compress.base import MATRICES
from paceline.compress.calibrate import Calibration, calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.work_folder import WorkFolder
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError, RequestError
from paceline.lm import LM
from paceline.models import load
from paceline.models.formats import writer
from paceline.models.tensors import Dense, Linear
from paceline.planning.recipe_search import RECIPES
from tests.conftest import shared


def job(out, spec="rtn:bits=4,group=32", name="stories260K", **options):
    return CompressionJob(load(shared("models", name)), out, parse_recipe(spec), **options)


def texts(name="stories260K", rows=4, seed=0):
    model = load(shared("models", name))
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (rows, 48))
    return Calibration(tokens, "noise")


def test_a_compressed_model_runs_everywhere_and_has_a_card(tmp_path, paceline):
    out = tmp_path / "small"
    model = shared("models", "stories260K")
    done = paceline(
        *(
            "compress",
            model,
            out,
            "--recipe",
            "rtn:bits=4,group=32",
            "--windows",
            3,
            "--json",
        )
    ).json
    assert done == json.loads((out / "card.json").read_text())
    assert 4.4 < done["size"]["bits_per_weight"] < 4.6
    assert done["price"]["windows"] == 3
    assert 0.3 < done["price"]["loss"]["firsts"] <= 1
    assert "| compressed, " in (out / "card.md").read_text()
    text = paceline("generate", "Once upon a time", "--model", out, "--max-new-tokens", 12)
    assert text.code == 0
    proof = paceline(
        *("prove", out, "--drafters", "recycle", "--temperatures", 0, "--limit", 2),
        *("--max-new-tokens", 16, "--json"),
    )
    assert proof.code == 0
    back = paceline("convert", out, tmp_path / "again.gguf", "--json")
    assert back.code == 0
    assert not list(tmp_path.glob(".*"))


def test_a_tuner_of_the_whole_model_takes_its_own_texts_unless_others_are_named():
    from paceline.cli.compress import CalibrationOptions

    model, recipe = load(shared("models", "stories260K")), parse_recipe("rtn+llm_qat")
    few = {"rows": 2, "length": 16}
    assert CalibrationOptions(**few).texts(model, recipe).origin == "the model's own texts"
    mixed = CalibrationOptions("mixed", **few).texts(model, recipe)
    assert "documentation" in mixed.origin
    half = calibration(model, count=8, length=32, own=lambda count: np.arange(count))
    assert half.origin == "2 texts of documentation, 2 of code, 4 that the model wrote"
    assert (np.diff(half.tokens[4:, 1:]) == 1).all()
    assert "documentation" in CalibrationOptions(**few).texts(model, parse_recipe("gptq")).origin


PAIRS = (
    {"sentence_good": "The cats play.", "sentence_bad": "The cats plays.", "UID": "one"},
    {"sentence_good": "Tom has a cat.", "sentence_bad": "Tom have a cat.", "UID": "two"},
)


def test_a_card_has_suites_of_source_and_result(tmp_path, paceline):
    passage = {"text": "Lily went to the park to play with her friend Tom"}
    for suite, rows in (("blimp", PAIRS), ("lambada", [passage])):
        (tmp_path / suite).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / suite / f"{suite}.jsonl").write_text(lines)
    out = tmp_path / "small"
    model = shared("models", "stories260K")
    words = ("compress", model, out, "--recipe", "rtn:bits=4,group=32", "--windows", 2)
    suites = ("--suite", "blimp", "--suite", "lambada", "--data", tmp_path)
    done = paceline(*words, *suites, "--prefix", "none", "--json").json
    blimp, lambada = done["price"]["suites"]
    assert [blimp["items"], lambada["items"]] == [2, 1]
    assert blimp["settings"] == blimp["base"]["settings"] == {"prefix": "none"}
    difference = lambada["paired"]["metrics"]["nats of the last word"]["difference"]
    assert difference == pytest.approx(
        lambada["metrics"]["nats of the last word"]["value"]
        - lambada["base"]["metrics"]["nats of the last word"]["value"]
    )
    card = (out / "card.md").read_text()
    assert "| blimp, prefix `none` | accuracy | 2 |" in card
    assert "| lambada, prefix `none` | nats of the last word | 1 |" in card


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--suite", "gsm8k"), "takes the suites blimp and lambada, not 'gsm8k'"),
        (("--suite", "blimp"), "needs its data"),
        (("--suite", "blimp", "--data", "nowhere"), "there is no folder nowhere"),
        (("--limit", 3), "are of --suite, which is not given"),
        (("--suite", "blimp", "--data", ".", "--no-measure"), "--no-measure leaves out"),
    ],
)
def test_suites_are_refused_before_the_work(tmp_path, paceline, words, said):
    out = tmp_path / "small"
    done = paceline(
        *("compress", shared("models", "stories260K"), out, "--recipe", "rtn:bits=4,group=32"),
        *words,
    )
    assert done.code == 2
    assert said in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    "spec",
    [
        "rtn:bits=3,group=32,symmetric=false",
        "magnitude:pattern=2:4",
        "svd:keep=0.5",
        "rtn:bits=2,group=32+eora:rank=4",
    ],
)
def test_both_engines_read_every_form(tmp_path, spec):
    made = job(tmp_path / "out", spec)
    size = made.run(texts())
    model = load(tmp_path / "out")
    matrices = [name for name in model.weights if name.rpartition(".")[2] in MATRICES]
    stored = [model.weights[name] for name in matrices]
    assert all(isinstance(each, Linear) for each in stored)
    assert any(not isinstance(each, Dense) for each in stored)
    assert sum(each.nbytes for each in stored) == size.matrices
    native = LM(tmp_path / "out", drafter="plain", budget=1)
    reference = ReferenceEngine(model.config, model.weights.to_arrays())
    ids = np.arange(5, 40, dtype=np.int32)
    rows = ([], [])
    for engine, found in zip((native.engine, reference), rows, strict=True):
        engine.start(ids, lambda _, __, logits, found=found: found.append(logits.copy()))
    one, other = (np.concatenate(found) for found in rows)
    assert np.abs(one - other).max() < 0.02 * np.abs(other).max()


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_what_is_kept_is_bit_identical(tmp_path, name):
    job(tmp_path / "out", name=name).run(texts(name))
    before, after = load(shared("models", name)), load(tmp_path / "out")
    assert after.config == before.config
    for each in before.weights:
        if each.rpartition(".")[2] not in MATRICES:
            assert np.array_equal(before.weights.dense(each), after.weights.dense(each)), each
    text = "Once upon a time"
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)


def test_memory_says_how_many_blocks_are_loaded(tmp_path, paceline):
    job(tmp_path / "out", "bitstack:blocks=3,rank=1").run(texts())
    words = (
        "generate",
        "Once upon a time",
        "--model",
        tmp_path / "out",
        "--max-new-tokens",
        4,
        "--budget",
        4,
    )
    done = paceline(*words, "--memory", "1KB")
    assert done.code == 2
    assert "takes at least" in done.err
    assert done.err.count("\n") == 1
    assert paceline(*words, "--memory", "0.25MB").code == 0
    small = paceline("convert", tmp_path / "out", tmp_path / "a.gguf", "--memory", "0.25MB")
    assert small.code == 0


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    spec = "awq:steps=1+rtn:bits=4,group=32"
    job(tmp_path / "whole", spec).run(texts())
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    rng = random.Random(0)
    writes = 0

    def interrupted(path, *rest):
        nonlocal writes
        writes -= 1
        if writes < 0:
            path.with_name(path.name + ".part").write_bytes(b"half of it")
            raise KilledError
        return original(path, *rest)

    original = writer.write_safetensors
    monkeypatch.setattr(writer, "write_safetensors", interrupted)
    kills = 0
    while not (tmp_path / "out").exists():
        writes = rng.randrange(4)
        try:
            job(tmp_path / "out", spec).run(texts())
        except KilledError:
            kills += 1
            assert not (tmp_path / "out").exists()
    assert kills > 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == wanted
    assert not list(tmp_path.glob(".*"))


def test_another_job_does_not_go_on_with_unfinished_work(tmp_path, monkeypatch):
    save = WorkFolder.save

    def save_and_stop(*args):
        save(*args)
        raise KilledError

    monkeypatch.setattr(WorkFolder, "save", save_and_stop)
    with pytest.raises(KilledError):
        job(tmp_path / "out").run(texts())
    with pytest.raises(RequestError, match="recipe differ"):
        job(tmp_path / "out", "rtn:bits=8,group=32").run(texts())
    with pytest.raises(RequestError, match="calibration differ"):
        job(tmp_path / "out").run(texts(seed=1))
    (tmp_path / ".out.partial" / "job.json").write_text("{")
    with pytest.raises(ModelError, match="to begin anew"):
        job(tmp_path / "out").run(texts())


@pytest.mark.parametrize("wrong", ["layer_drop:count=99", "attention_drop:count=99"])
def test_a_refused_recipe_leaves_nothing_in_the_way_of_the_next(tmp_path, wrong):
    with pytest.raises(MethodError, match="expected"):
        job(tmp_path / "out", wrong).run(texts())
    assert not list(tmp_path.iterdir())
    WorkFolder(tmp_path / ".out.partial", {"model": "killed before its first block"})
    job(tmp_path / "out").run(texts())
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["[]", "{", "3"])
@pytest.mark.parametrize("name", ["job.json", "extra-bits.json"])
def test_damaged_work_is_refused_in_one_sentence(tmp_path, name, content):
    WorkFolder(tmp_path / "work", {"model": "m"})
    (tmp_path / "work" / "block-0000.safetensors").touch()
    (tmp_path / "work" / name).write_text(content)
    with pytest.raises(ModelError, match=rf"{name}.*remove \S+work to begin anew"):
        WorkFolder(tmp_path / "work", {"model": "m"}).extra_bits()


def test_nothing_is_left_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise ModelError("cannot write out: No space left on device")

    monkeypatch.setattr(compression, "write_checkpoint", full)
    with pytest.raises(ModelError, match="No space left"):
        job(tmp_path / "out").run(texts())
    assert not (tmp_path / "out").exists()


def test_bad_requests_end_in_one_sentence(tmp_path, paceline):
    model = shared("models", "stories260K")
    out = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "short.txt").write_text("Once upon a time.")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    cases = {
        "name a new folder": (model, tmp_path / "full", "--recipe", "rtn"),
        "there is no folder": (model, tmp_path / "no" / "out", "--recipe", "rtn"),
        "did you mean gptq": (model, out, "--recipe", "gptqq"),
        "give more text, or fewer rows": (
            *(model, out, "--recipe", "gptq", "--calibration", tmp_path / "short.txt"),
        ),
        "line 1 of": (model, out, "--recipe", "gptq", "--calibration", tmp_path / "bad.jsonl"),
        "cannot read the calibration text": (
            *(model, out, "--recipe", "gptq", "--calibration", tmp_path / "none.txt"),
        ),
        "leave --calibration": (model, out, "--recipe", "rtn", "--rows", 3),
        "expected at least": (*(model, out, "--recipe", "rtn", "--text", tmp_path / "short.txt"),),
        "needs calibration": (model, out, "--recipe", "rtn", "--head", "gptq"),
    }
    for said, words in cases.items():
        measure = () if "--text" in words else ("--no-measure",)
        done = paceline("compress", *words, *measure)
        assert done.code == 2
        assert said in done.err
        assert done.err.count("\n") == 1
        assert not out.exists()


def test_what_is_compressed_already_needs_again(tmp_path):
    job(tmp_path / "one").run(texts())
    with pytest.raises(RequestError, match="add --again"):
        CompressionJob(load(tmp_path / "one"), tmp_path / "two", parse_recipe("rtn"))
    once_more = CompressionJob(
        load(tmp_path / "one"), tmp_path / "two", parse_recipe("rtn:bits=3,group=32"), True
    )
    once_more.run(texts())
    assert load(tmp_path / "two").weights["layers.0.q"].bits == 3


def test_a_rule_that_no_matrix_falls_under_is_refused(tmp_path):
    model, file = load(shared("models", "stories260K")), tmp_path / "rules.toml"
    for patterns in (["*.nope"], ["layers.99.*"], ["*.q", "layers.0.q"]):
        rules = (f'[[rule]]\nmatch = "{each}"\nrecipe = "keep"\n' for each in patterns)
        file.write_text('recipe = "rtn"\n' + "".join(rules))
        with pytest.raises(MethodError, match=f"under the rule for '{re.escape(patterns[-1])}'"):
            CompressionJob(model, tmp_path / "out", parse_recipe(str(file)))


def test_values_that_are_no_numbers_are_refused(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shared("models", "stories260K"), broken)
    (broken / "model.safetensors").chmod(0o644)
    model = load(broken)
    huge = CompressionJob(model, tmp_path / "out", parse_recipe("rtn:bits=4,group=32"))
    layer = huge._layer
    huge._layer = lambda index: {
        name: each * (torch.inf if name == "attn_norm" else 1)
        for name, each in layer(index).items()
    }
    with pytest.raises(ModelError, match=r"layers.0.attn_norm holds NaN or infinite weights"):
        huge.run(texts())
    huge._layer = lambda index: {
        name: each * (1e38 if name == "attn_norm" else 1) for name, each in layer(index).items()
    }
    with pytest.raises(ModelError, match="no numbers on the calibration texts"):
        huge.run(texts())
    assert not (tmp_path / "out").exists()


def test_calibration_texts_come_from_what_was_named(tmp_path):
    model = load(shared("models", "stories260K"))
    file = tmp_path / "text.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"Line {i} of a story. "}) + "\n" for i in range(99))
    )
    one = calibration(model, str(file), 5, 32, seed=1)
    assert one.tokens.shape == (5, 32)
    assert np.array_equal(one.tokens, calibration(model, str(file), 5, 32, seed=1).tokens)
    assert not np.array_equal(one.tokens, calibration(model, str(file), 5, 32, seed=2).tokens)
    mixed = calibration(model, count=8, length=32)
    assert mixed.tokens.shape == (8, 32)
    assert "documentation" in mixed.origin
    half = calibration(model, count=8, length=32, own=lambda count: np.arange(count))
    assert half.origin == "2 texts of documentation, 2 of code, 4 that the model wrote"
    assert (np.diff(half.tokens[4:, 1:]) == 1).all()
    written = calibration(model, "own", 3, 16, own=lambda count: np.arange(count + 9))
    assert (np.diff(written.tokens[:, 1:]) == 1).all()
    with pytest.raises(RequestError, match=r"need an engine"):
        calibration(model, "own", 3, 16)


def test_a_gguf_file_has_its_card_beside_it(tmp_path, paceline):
    out, model = tmp_path / "small.gguf", shared("models", "TinyStories-656K")
    words = ("compress", model, out, "--recipe", "gguf:type=q4_k", "--head", "gguf:type=q8_0")
    done = paceline(*words, "--rows", 4, "--length", 64, "--windows", 2, "--json")
    assert done.code == 0
    card = done.json
    assert card["notes"] == [
        "12 matrices are Q5_0 instead of Q4_K: rows of 128 are no whole blocks of it.",
        "2 matrices are Q5_0 instead of Q4_K: rows of 384 are no whole blocks of it.",
    ]
    assert card["size"]["bits_per_weight"] == 5.5
    assert card["size"]["total"] < out.stat().st_size
    assert json.loads((tmp_path / "small.card.json").read_text()) == card
    assert "12 matrices are Q5_0" in (tmp_path / "small.card.md").read_text()
    again = paceline(*words, "--no-measure")
    assert again.code == 2
    assert "exists already; name a new file" in again.err


def test_the_command_searches(tmp_path, paceline):
    out, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. " * 120)
    words = ("compress", shared("models", "stories260K"), out, "--text", text, "--windows", 2)
    done = paceline(*words, "--target-loss", 5, "--rows", 2, "--length", 32, "--json").json
    assert done["recipe"] == RECIPES[0]
    assert done["notes"][0].startswith(f"Tried `{RECIPES[0]}`")
    assert json.loads((out / "card.json").read_text())["name"] == "small"


def test_the_command_gives_matrices_levels_of_their_own(tmp_path, paceline):
    out = tmp_path / "small"
    words = ("compress", shared("models", "stories260K"), out, "--recipe", "rtn:group=32")
    texts = ("--rows", 2, "--length", 32, "--calibration", tmp_path / "text.txt", "--no-measure")
    (tmp_path / "text.txt").write_text("Once upon a time there was a little girl. " * 120)
    search = "evopress:generations=1,offspring=2,tokens=64,first_tokens=32"
    done = paceline(*words, *texts, "--budget", "bytes=280KB", "--allocate", search, "--json").json
    assert done["size"]["total"] <= 280_000
    assert done["notes"][-1].startswith("Searched in ")
    assert "[[rule]]" in (out / "recipe.toml").read_text()
    assert not (tmp_path / ".small.search").exists()


def test_levels_of_a_recipe_are_tried_until_one_loses_little(tmp_path, paceline):
    out, text = tmp_path / "small", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl named Lily. " * 120)
    words = ("compress", shared("models", "stories260K"), out, "--text", text, "--windows", 2)
    done = paceline(*words, "--recipe", "magnitude", "--target-loss", 0.5, "--json").json
    shares = [note.split("`")[1] for note in done["notes"] if note.startswith("Tried")]
    assert shares[0] == "magnitude:sparsity=0.8"
    assert done["recipe"] == shares[-1]
    assert len(shares) > 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give --recipe, or --target-loss"),
        (("--recipe", "rtn:bits=4", "--target-loss", 1), "has one level"),
        (
            ("--recipe", "rtn", "--target-loss", 1, "--budget", "bytes=1MB"),
            "leave --target-loss out",
        ),
        (("--target-loss", 1, "--budget", "bytes=1MB"), "--budget needs --recipe"),
        (("--recipe", "rtn", "--budget", "1MB"), "expected bytes=SIZE"),
        (("--recipe", "rtn", "--budget", "bytes=1MB", "--allocate", "evo"), "evopress"),
        (("--recipe", "rtn", "--allocate", "evopress:seed=1"), "--allocate is of --budget"),
        (("--target-loss", 1, "--no-measure"), "leave --no-measure out"),
    ],
)
def test_a_search_needs_what_it_measures(tmp_path, paceline, options, said):
    done = paceline("compress", shared("models", "stories260K"), tmp_path / "small", *options)
    assert done.code == 2
    assert said in " ".join(done.err.split())

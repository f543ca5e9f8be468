"""Every method of compression: what it stores is read back to the bit, runs in both engines, drafts
as plain decoding answers, and follows a schema; and a job that is killed anywhere ends the same."""

import json
import random
import signal
import sys
from dataclasses import fields
from time import process_time

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from paceline.compress.base import MATRICES
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.work_folder import WorkFolder
from paceline.decoding.governor import Fixed
from paceline.engines.reference import ReferenceEngine
from paceline.lm import LM
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.prompts import Dialogue
from paceline.measuring.proof import prove
from paceline.models import load
from paceline.models.tensors import Linear
from paceline.registry import (
    corrections,
    drafters,
    factorizers,
    pruners,
    quantizers,
    structures,
    transforms,
    tuners,
)
from tests.conftest import shared

FRAMES = (
    (structures, "{}+rtn:bits=8,group=32"),
    (pruners, "{}"),
    (quantizers, "{}"),
    (factorizers, "{}"),
    (transforms, "{}+rtn:group=32"),
    (corrections, "rtn:bits=3,group=32+{}"),
    (tuners, "rtn:bits=3,group=32+{}"),
)


def brief(method):
    """Return the first example of a method, with few steps of training where it has any."""
    spec = method.examples[0]
    if "steps" in {field.name for field in fields(method)} and "steps=" not in spec:
        spec += f"{',' if ':' in spec else ':'}steps=2"
    return spec


RECIPES = {
    name: frame.format(brief(method))
    for family, frame in FRAMES
    for name, method in family.methods().items()
    if method.__module__.startswith("paceline.")
} | {
    "pst": "wanda+pst:steps=2,rank=2",
    "darex": "temp_lora:rank=2+darex:drop=0.5,rows=1+rtn:bits=8,group=32",
    "changes to a base": "temp_lora:rank=2+darex:drop=0.5,rows=1",
    "pruner and quantizer": "sparsegpt:pattern=2:4+gptq:bits=3,group=32",
    "pruner and correction": "wanda:pattern=2:4+eora:rank=8",
    "pruner, quantizer and correction": "dass+rtn:bits=4,group=32+eora:rank=4",
}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The first two layers of a model that tells stories."""
    torch.set_num_threads(1)  # so small a model only waits for a second
    folder = tmp_path_factory.mktemp("matrix") / "source"
    folder.mkdir()
    original = shared("models", "stories260K")
    for file in original.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    tensors = load_file(original / "model.safetensors")
    dropped = tuple(f".layers.{index}." for index in range(2, settings["num_hidden_layers"]))
    save_file(
        {name: each for name, each in tensors.items() if not any(d in name for d in dropped)},
        folder / "model.safetensors",
    )
    return load(folder)


def texts(model):
    story = "Once upon a time there was a little girl named Lily. She liked to play. " * 12
    tokens = np.array(model.tokenizer.encode(story)[: 4 * 48], np.int64)
    return Calibration(tokens.reshape(4, 48), "a story")


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_method_stores_runs_everywhere(source, name, tmp_path, monkeypatch):
    made, save, keep = {}, WorkFolder.save, WorkFolder.keep_tuned

    def note(index, tensors):
        for each, weight in tensors.items():
            dense = weight.dense() if isinstance(weight, Linear) else weight.numpy()
            made[f"layers.{index}.{each}"] = dense

    def saved(work, block):
        note(block.index, block.tensors)
        save(work, block)

    def tuned(work, layers):
        for index, tensors in enumerate(layers):
            note(index, tensors)
        keep(work, layers)

    monkeypatch.setattr(WorkFolder, "save", saved)
    monkeypatch.setattr(WorkFolder, "keep_tuned", tuned)
    out = tmp_path / "out"
    CompressionJob(source, out, parse_recipe(RECIPES[name])).run(texts(source))
    model = load(out)
    for each in model.weights:
        if (other := model.weights.shared_with(each)) is not None:
            made[each] = made[other] + made.get(each, np.float32(0))
    assert {each for each in model.weights if each.startswith("layers.")} == made.keys()
    changed = 0
    for each, values in made.items():
        assert np.array_equal(model.weights.dense(each), values), each
        matrix = each.rpartition(".")[2] in MATRICES
        changed += matrix and not np.array_equal(values, source.weights.dense(each))
    assert changed
    rounds = "roundedinputs" in model.weights.formats()  # which torch alone computes
    with LM(out, drafter="plain", budget=1, threads=None if rounds else 1) as lm:
        if rounds:
            assert lm.engine.name == "reference"
        else:
            check_engines(lm, model)
        check_drafts(lm)
        answer = lm.generate("Once", schema=SCHEMA, max_new_tokens=40, temperature=0)
        assert 0 <= json.loads(answer.text)["size"] <= 99


def check_engines(lm, model):
    """Both engines see the same matrices and compute about the same."""
    reference = ReferenceEngine(model.config, model.weights.to_arrays())
    ids = np.arange(5, 40, dtype=np.int32)
    rows = ([], [])
    for engine, found in zip((lm.engine, reference), rows, strict=True):
        engine.start(ids, lambda _, __, logits, found=found: found.append(logits.copy()))
    one, other = (np.concatenate(found) for found in rows)
    assert np.abs(one - other).max() < 0.02 * np.abs(other).max()


def check_drafts(lm):
    """Drafts change no output, greedy or drawn."""
    dialogues = [Dialogue(("Once upon a time",), "text", 1)]
    methods = {"blend": drafters.parse("blend")}
    options = TurnOptions(24)
    proof = prove(lm, methods, dialogues, (0.0, 0.8), options, lambda: Fixed(8))
    assert (proof.total("pairs"), proof.total("identical"), proof.total("bugs")) == (2, 2, 0)


class KilledError(BaseException):  # nothing that catches errors catches it
    pass


def test_a_job_that_is_killed_at_twenty_moments_ends_in_the_same_bytes(
    source, tmp_path, monkeypatch
):
    # A kill that falls into a callback of the garbage collector is reported and lost.
    reported = sys.unraisablehook
    monkeypatch.setattr(
        sys,
        "unraisablehook",
        lambda lost: None if lost.exc_type is KilledError else reported(lost),
    )
    recipe = parse_recipe("gptq:bits=3,group=32+eora:rank=2")
    start = process_time()
    CompressionJob(source, tmp_path / "whole", recipe).run(texts(source))
    seconds = process_time() - start
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    moments, kills, runs, armed = random.Random(0), 0, 0, False

    def kill(*_):
        if armed:  # a signal may arrive after the job that it is for
            raise KilledError

    before = signal.signal(signal.SIGVTALRM, kill)
    try:
        while kills < 20:
            runs += 1
            out = tmp_path / f"out{runs}"
            while not out.exists():
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_VIRTUAL, moments.uniform(0.001, seconds))
                    CompressionJob(source, out, recipe).run(texts(source))
                    armed = False
                except KilledError:
                    kills += 1
            assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

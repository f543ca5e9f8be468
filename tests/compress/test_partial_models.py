"""Models that lost parts of some layers: whatever works with a whole model works with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.decoding.governor import Fixed
from paceline.engines.native import NativeEngine
from paceline.errors import ModelError
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.prompts import Dialogue
from paceline.measuring.proof import prove
from paceline.models import load
from paceline.registry import drafters, heads
from paceline.training.heads import HeadRecipe, HeadTraining
from tests.compress.test_structure import source, texts  # noqa: F401

# The first layer without attention, one without an MLP, one narrower, one gone altogether.
SHAPE = "shape:mlp=172/0/88/172/0,heads=0/4/3/4/0,rows=2"
TEXT = "Once upon a time there was a little dog who liked to play with a red ball. " * 6
DOCUMENTS = ["Tom had a big red ball. He liked it.", {"title": "Lily", "text": "She had a cat."}]


@pytest.fixture(scope="module", params=["keep", "rtn:bits=8,group=32"])
def folder(source, request, tmp_path_factory):  # noqa: F811
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("partial") / "out"
    recipe = SHAPE if request.param == "keep" else f"{SHAPE}+{request.param}"
    CompressionJob(source, out, parse_recipe(recipe)).run(texts(source))
    layers = load(out).config.layers
    assert [(each.intermediate, each.kv_heads) for each in layers] == [
        *((172, 0), (0, 4), (88, 3), (172, 4)),
    ]
    return out


def opened(folder, **options):
    return LM(folder, **{"threads": 1, "drafter": "plain", "budget": 1, **options})


def answer(lm, prompt="Once upon a time", **options):
    return lm.generate(prompt, **{"max_new_tokens": 24, "temperature": 0, **options}).tokens


@pytest.mark.parametrize("spec", ["layer_skip:skip=1", "layer_skip", "sparse_kv", "blend"])
def test_drafters_answer_as_plain_decoding(folder, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with opened(folder) as lm:
        dialogues = [Dialogue(("Once upon a time",), "text", 1)]
        methods = {"one": drafters.parse(spec)}
        proof = prove(lm, methods, dialogues, (0.0, 0.8), TurnOptions(24), lambda: Fixed(6))
    assert (proof.total("pairs"), proof.total("identical"), proof.total("bugs")) == (2, 2, 0)


@pytest.mark.parametrize("kv_format", ["fp32", "int8", "int4"])
def test_prefixes_on_disk_are_read_by_another_process(folder, kv_format, tmp_path):
    with opened(folder, kv_format=kv_format) as lm:
        plain = answer(lm, TEXT + "The cat")
    for _ in range(2):
        with opened(folder, kv_format=kv_format, prefix_cache_dir=tmp_path) as lm:
            found = lm.generate(TEXT + "The cat", max_new_tokens=24, temperature=0)
            assert found.tokens == plain
    assert found.cached_tokens >= 64


@pytest.mark.parametrize("recompute", [0, 0.3])
def test_chunks_of_documents_in_memory_and_on_disk_are_alike(folder, recompute, tmp_path):
    options = {"documents": DOCUMENTS, "recompute": recompute}
    with opened(folder) as lm:
        plain = answer(lm, **options)
        assert answer(lm, **options) == plain
        assert plain != answer(lm)
    for _ in range(2):
        with opened(folder, chunk_cache_dir=tmp_path) as lm:
            assert answer(lm, **options) == plain


def test_weights_that_stream_from_disk_compute_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load(folder)
    config = replace(model.config, layers=4 * model.config.layers)
    weights = {name: model.weights[name] for name in model.weights if "layers" not in name}
    for index in range(len(config.layers)):
        prefix = f"layers.{index % 4}."
        for name in model.weights:
            if name.startswith(prefix):
                weights[f"layers.{index}.{name.removeprefix(prefix)}"] = model.weights[name]

    def engine(**options):
        return NativeEngine(config, weights, 1, "auto", **options)

    with pytest.raises(ModelError, match="expected at least") as caught:
        engine(weights_memory=1)
    smallest = int(str(caught.value).split("at least ")[1].split(":")[0])
    ids, rows = np.arange(5, 45, dtype=np.int32), []
    for each in (engine(), engine(weights_memory=smallest)):
        found = []
        each.start(ids, lambda _, __, logits, found=found: found.append(logits.copy()), 16)
        rows.append(np.concatenate(found))
    assert each.streamed_bytes
    assert np.array_equal(*rows)


def test_a_head_is_trained_and_drafts(folder, tmp_path):
    with opened(folder) as lm:
        recipe = HeadRecipe(tokens=1000, epochs=2, batch=64, rate=1e-2)
        work = HeadTraining(lm, heads.parse("recurrent:depth=2,width=1"), tmp_path / "h", recipe)
        work.write([lm.tokenizer.encode("Once upon a time")], lambda count: None)
        work.learn(lambda count: None)
        plain = answer(lm)
    with opened(folder, drafter=f"head:path={tmp_path / 'h'}", budget=4) as lm:
        assert answer(lm) == plain


@pytest.mark.parametrize(
    "spec", ["h2o:budget=32,recent=8,every=8", "snapkv:budget=32,recent=8,every=8"]
)
def test_smaller_caches_answer_alike_with_drafts(folder, spec):
    with opened(folder, kv_policy=spec) as lm:
        plain = answer(lm, TEXT)
    with opened(folder, kv_policy=spec, drafter="lookup", budget=6) as lm:
        assert answer(lm, TEXT) == plain


def test_the_stored_format_runs_in_the_reference_engine(folder):
    with opened(folder, engine="reference", dtype="stored", threads=None) as lm:
        ids = np.asarray(lm.tokenizer.encode("Once upon a time"), np.int32)
        rows = []
        lm.engine.start(ids, lambda _, __, logits: rows.append(logits.copy()))
    with opened(folder) as lm:
        others = []
        lm.engine.start(ids, lambda _, __, logits: others.append(logits.copy()))
    one, other = np.concatenate(rows), np.concatenate(others)
    assert np.abs(one - other).max() < 0.02 * np.abs(one).max()

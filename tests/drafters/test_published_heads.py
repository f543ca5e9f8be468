"""Medusa heads as others publish them: read, drafted with, and refused where they do not fit."""

import json

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.drafters.draft_model.published_heads import (
    CONFIG,
    PICKLED,
    TENSORS,
    read_published,
)
from paceline.drafters.heads.base import head_target
from paceline.drafters.heads.medusa import Medusa
from paceline.errors import MethodError, ModelError
from paceline.models.formats.writer import Pending, write_safetensors
from tests.conftest import shared

SMALL = shared("models", "stories260K")
HEADS, LAYERS, SIZE, VOCABULARY = 3, 2, 64, 512


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target():
    with LM(SMALL, drafter="plain", budget=0) as lm:
        return head_target(lm.model)


def tensors_of(target, seed=0):
    """The tensors of heads whose outputs are the model's, a little shifted."""
    random = np.random.default_rng(seed)
    tensors = {}
    for head in range(HEADS):
        for block in range(LAYERS):
            weight = 0.05 * random.standard_normal((SIZE, SIZE))
            tensors[f"{head}.{block}.linear.weight"] = weight.astype(np.float32)
            tensors[f"{head}.{block}.linear.bias"] = np.zeros(SIZE, np.float32)
        tensors[f"{head}.{LAYERS}.weight"] = target.unembedding.numpy() * np.float32(1 + head / 8)
    return tensors


def publish(folder, tensors, kind="F32", prefix="", **changes):
    folder.mkdir(exist_ok=True)
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": LAYERS, "version": "2"} | changes
    (folder / CONFIG).write_text(json.dumps(config))
    if kind == "BF16":
        tensors = {n: (t.view(np.uint32) >> 16).astype(np.uint16) for n, t in tensors.items()}
    if kind == "F16":
        tensors = {n: t.astype(np.float16) for n, t in tensors.items()}
    pending = {
        prefix + n: Pending(t.shape, lambda t=t: t, kind) for n, t in sorted(tensors.items())
    }
    write_safetensors(folder / TENSORS, pending)
    return folder


@pytest.mark.parametrize(("kind", "prefix"), [("F32", ""), ("F16", "medusa_head."), ("BF16", "")])
def test_logits_are_those_of_the_published_formula(target, tmp_path, kind, prefix):
    tensors = tensors_of(target)
    loaded = read_published(publish(tmp_path / "heads", tensors, kind, prefix), target)
    assert (loaded.head.depth, loaded.head.layers, loaded.head.output) == (HEADS, LAYERS, "own")
    hidden = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(0))
    for head in range(HEADS):
        state = hidden
        for block in range(LAYERS):
            weight = torch.from_numpy(tensors[f"{head}.{block}.linear.weight"])
            state = state + torch.nn.functional.silu(state @ weight.T)
        expected = state @ torch.from_numpy(tensors[f"{head}.{LAYERS}.weight"]).T
        path = torch.zeros(5, head + 1).long()
        found = loaded.head.logits(loaded.parameters, target, hidden, path)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.3)
        some = torch.tensor([3, 77, 500])
        few = loaded.head.columns(loaded.parameters, some)
        torch.testing.assert_close(
            loaded.head.logits(few, target, hidden, path), found[:, some], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("vocabulary", [0, 128])
def test_it_drafts_and_the_output_is_plain_decodings(target, tmp_path, engine, vocabulary):
    folder = publish(tmp_path / "heads", tensors_of(target))
    drafter = f"head:path={folder},vocabulary={vocabulary}"
    with (
        LM(SMALL, engine=engine, drafter=drafter, budget=8) as drafting,
        LM(SMALL, engine=engine, drafter="plain", budget=0) as plain,
    ):
        found, expected = (
            each.generate("Once upon a time", max_new_tokens=40, temperature=0)
            for each in (drafting, plain)
        )
        assert found.tokens == expected.tokens


def test_what_does_not_fit_is_refused(target, tmp_path):
    tensors = tensors_of(target)
    with pytest.raises(ModelError, match="has medusa_num_heads 0 and medusa_num_layers 2"):
        read_published(publish(tmp_path / "a", tensors, medusa_num_heads=0), target)
    with pytest.raises(ModelError, match=r"3\.0\.linear\.weight is missing"):
        read_published(publish(tmp_path / "b", tensors, medusa_num_heads=4), target)
    small = tensors | {f"0.{LAYERS}.weight": np.zeros((VOCABULARY, SIZE // 2), np.float32)}
    with pytest.raises(ModelError, match=r"0\.2\.weight has the shape \[512, 32\] in"):
        read_published(publish(tmp_path / "c", small), target)
    broken = tensors | {"1.0.linear.bias": np.full(SIZE, np.nan, np.float32)}
    with pytest.raises(ModelError, match="not finite"):
        read_published(publish(tmp_path / "d", broken), target)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / PICKLED).write_bytes(b"x")
    with pytest.raises(ModelError, match="holds only pickled tensors"):
        LM(SMALL, drafter=f"head:path={tmp_path / 'e'}")
    with pytest.raises(MethodError, match="medusa:output is 'x', expected shared or own"):
        Medusa(output="x")

"""BitStack: blocks that lose less and less, any size at load time, held as they are stored."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from paceline.compress.base import Statistic, Statistics
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError, RequestError
from paceline.lm import LM
from paceline.models import load
from paceline.models.tensors import SignBlocks
from paceline.registry import factorizers
from tests.conftest import shared

STORY = "Once upon a time"


def compress(out, recipe):
    model = load(shared("models", "stories260K"))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 48))
    CompressionJob(model, out, parse_recipe(recipe)).run(Calibration(tokens, "noise"))
    return out


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    return compress(tmp_path_factory.mktemp("bitstack") / "stacked", "bitstack")


def test_each_block_takes_a_share_of_what_is_missed():
    torch.manual_seed(0)
    x = torch.randn(300, 96) * torch.logspace(0, -2, 96)
    stats = Statistics().plus(x, frozenset({Statistic.INPUT_NORM}))
    weight = torch.randn(64, 96)
    weight[0] = 0
    matrix = factorizers.parse("bitstack:blocks=5,rank=2").compress(weight, stats)
    scales = x.square().mean(0).sqrt()
    whole = (weight * scales).square().sum()
    errors = []
    for count in range(1, 6):
        part = matrix.first(count)
        assert part.nbytes == matrix.sizes[count - 1]
        missed = (torch.from_numpy(part.dense()) - weight) * scales
        errors.append(float(missed.square().sum() / whole))
    np.testing.assert_allclose(matrix.losses, errors, rtol=1e-3)
    assert all(after < 0.6 * before for before, after in pairwise(errors))


def test_more_memory_loses_less_and_never_takes_more_than_it_may(stacked):
    original = load(shared("models", "stories260K")).weights
    whole = load(stacked).weights
    missed = []
    for share in (0.55, 0.7, 0.85, 1):
        size = int(share * whole.nbytes())
        weights = load(stacked, size).weights
        assert 0.97 * size < weights.nbytes() <= size
        gaps = [weights.dense(name) - original.dense(name) for name in original]
        missed.append(sum(float((gap**2).sum()) for gap in gaps))
    assert missed[0] > missed[1] > missed[2] > missed[3]
    assert load(stacked, 10**9).fingerprint() == load(stacked).fingerprint()
    assert load(stacked, size // 2).fingerprint() != load(stacked).fingerprint()


def test_a_cut_model_answers_with_the_blocks_as_they_are_stored(stacked):
    size = int(0.8 * load(stacked).weights.nbytes())
    with LM(stacked, memory=f"{size / 1000:.3f}KB", drafter="blend", budget=8) as lm:
        assert (lm.engine.name, lm.engine.format) == ("reference", "stored")
        drafted = lm.generate(STORY, max_new_tokens=16, temperature=0).text
        weights = load(stacked, size).weights
        expanded = ReferenceEngine(load(stacked).config, weights.to_arrays())
        ids = np.arange(5, 40, dtype=np.int32)
        rows = ([], [])
        for engine, found in zip((lm.engine, expanded), rows, strict=True):
            engine.start(ids, lambda _, __, logits, found=found: found.append(logits.copy()))
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    with LM(stacked, memory=size, drafter="plain", budget=8) as lm:
        assert lm.generate(STORY, max_new_tokens=16, temperature=0).text == drafted


def test_pruned_matrices_are_expanded_while_their_layer_runs(tmp_path):
    out = compress(tmp_path / "pruned", "magnitude:sparsity=0.5")
    with LM(out, dtype="stored", budget=8) as lm, LM(out, engine="reference", budget=8) as whole:
        assert lm.engine.format == "stored"
        assert all(
            lm.generate(STORY, max_new_tokens=12, seed=seed).text
            == whole.generate(STORY, max_new_tokens=12, seed=seed).text
            for seed in range(2)
        )


def test_what_cannot_be_cut_is_refused_in_one_sentence(stacked):
    least = "takes at least"
    cases = (
        ({"memory": "1KB"}, ModelError, least),
        ({"memory": "80 apples"}, RequestError, "a number of bytes such as 80MB"),
        ({"memory": True}, RequestError, "expected a number of bytes"),
        ({"memory": 500_000, "engine": "native"}, MethodError, "the native engine would expand"),
        ({"memory": 500_000, "engine": "static"}, MethodError, "the static engine would expand"),
        ({"memory": 500_000, "dtype": "bf16"}, MethodError, "the format bf16 would expand"),
        ({"memory": 500_000, "threads": 2}, MethodError, "leave threads out"),
        ({"dtype": "stored", "engine": "native"}, MethodError, "has no format 'stored'"),
    )
    for options, kind, said in cases:
        with pytest.raises(kind, match=said):
            LM(stacked, **options)
    with pytest.raises(ModelError, match="no blocks that could be left out"):
        LM(shared("models", "stories260K"), memory="80MB")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": np.float32([0.1, 0.2])}, "losses of the blocks rise"),
        ({"losses": np.float32([0.1])}, "losses are"),
        ({"signs": np.zeros((2, 3, 2), np.uint8)}, r"expected uint8 \[2, 3, 1\]"),
        ({"left": np.full((2, 3, 1), np.inf, np.float16)}, "NaN or infinite"),
        ({"left": np.ones((3, 3, 1), np.float16)}, "as many blocks"),
        ({"right": np.ones((2, 1, 4), np.float32)}, "expected float16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, said):
    parts = {
        "signs": np.zeros((2, 3, 1), np.uint8),
        "left": np.ones((2, 3, 1), np.float16),
        "right": np.ones((2, 1, 4), np.float16),
        "losses": np.float32([0.2, 0.1]),
    }
    assert SignBlocks(**parts).dense().tolist() == [[-2.0] * 4] * 3
    with pytest.raises(ModelError, match=said):
        SignBlocks(**{**parts, **change})

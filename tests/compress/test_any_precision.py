"""One file, several widths: codes are prefixes of each other, and each width runs end to end."""

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.compress.base import Statistics
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.quantize.grids.kmeans import RowClusters
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError, ModelError, RequestError
from paceline.models import load
from paceline.models.nested import Width
from paceline.registry import quantizers
from tests.conftest import shared

TEXT = "Once upon a time there was a little girl named Lily. She liked to play. " * 8


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    model = load(shared("models", "stories260K"))
    tokens = np.array(model.tokenizer.encode(TEXT)[:96], np.int64).reshape(2, 48)
    out = tmp_path_factory.mktemp("nested") / "out"
    recipe = parse_recipe("any_precision:min_bits=3,bits=6")
    CompressionJob(model, out, recipe).run(Calibration(tokens, "a story"))
    return out


def weights(rows=12, columns=60):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(rows, columns))).float()


def test_every_width_is_a_prefix_and_loses_less():
    weight = weights()
    whole = quantizers.parse("any_precision:min_bits=2,bits=6").compress(weight, Statistics())
    errors = []
    for count, width in enumerate((2, 3, 4, 5, 6), 1):
        part = whole.first(count)
        assert len(part.planes) == width
        np.testing.assert_array_equal(part.planes, whole.planes[:width])
        missed = torch.from_numpy(part.dense()) - weight
        errors.append(float(missed.square().sum() / weight.square().sum()))
        assert part.nbytes < whole.nbytes or part is whole
    assert (np.diff(errors) < 0).all()
    assert whole.losses == pytest.approx(errors, rel=1e-3)


def test_the_narrowest_codes_are_as_good_as_codes_of_that_width_alone():
    weight = weights()
    nested = quantizers.parse("any_precision:min_bits=3,bits=8").compress(weight, Statistics())
    alone = quantizers.parse("squeezellm:bits=3,outliers=0").compress(weight, Statistics())
    np.testing.assert_array_equal(nested.first(1).dense(), alone.dense())


def test_parted_clusters_lie_within_each_other():
    values = weights(4, 40)
    clusters = RowClusters(values, torch.ones_like(values))
    entries = clusters.fit(4)
    bounds = clusters.bounds(entries)
    parted, inner = clusters.split(entries, bounds)
    assert torch.equal(inner[:, ::2], bounds)
    assert torch.equal(clusters.codes(inner) >> 1, clusters.codes(bounds))
    assert parted.shape == (4, 8)


def test_a_width_is_chosen_when_a_model_is_loaded(stored):
    losses = []
    sizes = []
    reference = load(shared("models", "stories260K"))
    tokens = reference.tokenizer.encode(TEXT)[:60]
    whole = reference.weights.dense("layers.0.up")
    for bits in (3, 4, 5, 6):
        model = load(stored, Width(bits))
        assert len(model.weights.stored("layers.1.q").planes) == bits
        losses.append(np.square(model.weights.dense("layers.0.up") - whole).sum())
        sizes.append(model.weights.nbytes())
    assert (np.diff(losses) < 0).all()
    assert (np.diff(sizes) > 0).all()
    with LM(stored, memory="4bits", drafter="plain") as lm, LM(stored, drafter="plain") as full:
        assert lm.engine.config == full.engine.config
        narrow, wide = (each.generate(tokens, max_new_tokens=8) for each in (lm, full))
        assert len(narrow.tokens) == len(wide.tokens) == 8
    with LM(stored, memory=sizes[1], drafter="plain") as lm:
        assert lm.model.weights.nbytes() <= sizes[1]


@pytest.mark.parametrize(
    ("memory", "error", "said"),
    [
        ("2bits", ModelError, "loaded with 3 to 6 bits, not 2"),
        ("8 bits", ModelError, "loaded with 3 to 6 bits, not 8"),
        ("9bits", RequestError, "a number of bytes such as 80MB"),
    ],
)
def test_a_width_that_is_not_there_is_refused(stored, memory, error, said):
    with pytest.raises(error, match=said):
        LM(stored, memory=memory)


def test_a_model_without_widths_is_refused():
    with pytest.raises(ModelError, match="any_precision"):
        LM(shared("models", "stories260K"), memory="4bits")


@pytest.mark.parametrize("spec", ["any_precision:min_bits=5,bits=5", "any_precision:bits=9"])
def test_wrong_settings_are_refused(spec):
    with pytest.raises(MethodError, match="any_precision"):
        quantizers.parse(spec)

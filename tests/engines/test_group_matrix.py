"""A compressed model decodes the same tokens with drafts as without, in every stored form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from paceline.control.base import bind
from paceline.control.temperature import Temperature
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.engines.native import NativeEngine
from paceline.models import load
from paceline.models.tensors import Grouped
from paceline.models.vocabulary import Vocabulary
from paceline.registry import drafters
from tests.conftest import shared

PROMPT = "Once upon a time, there was a little girl named Lily."
FORMS = [(bits, 32 * (1 + bits % 2), bool(bits % 3)) for bits in (2, 3, 4, 5, 6, 7, 8)]


def rounded(values: np.ndarray, bits: int, group: int, zero: bool) -> Grouped:
    """The nearest integers, groups of their own in a row that is no multiple of them."""
    rows, columns = values.shape
    groups = np.pad(values, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    low, high, top = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0), (1 << bits) - 1
    half = 1 << (bits - 1)
    size = (high - low) / top if zero else np.maximum(high / (half - 1), -low / half)
    scales = size.astype(np.float16).astype(np.float32)
    inverse = 1 / np.where(scales > 0, scales, np.inf)
    points = np.rint(-low * inverse).clip(0, top) if zero else np.full_like(scales, half)
    codes = np.rint(groups * inverse[..., None] + points[..., None]).clip(0, top)
    codes = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns].astype(np.uint8))
    zeros = points.astype(np.uint16) if zero else None
    return Grouped(bits, codes, scales, group, zeros, scale_type="F16")


class Compressed(Mapping):
    """The weights of a model, its matrices as integers."""

    def __init__(self, weights, *form) -> None:
        self.weights, self.form = weights, form

    def __getitem__(self, name):
        values = np.asarray(self.weights[name], np.float32)
        return rounded(values, *self.form) if values.ndim == 2 else values

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


@pytest.mark.parametrize("act", ["int16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_drafts_change_no_token_of_a_compressed_model(form, act) -> None:
    model = load(shared("models", "stories260K"))
    weights = Compressed(model.weights, *form)
    engine = NativeEngine(model.config, weights, format=f"auto:act={act}")
    wide = {"group8", "group8_zero", "int8_fp16", "int8_zero"}
    expected = wide if form[0] > 6 else {f"group{form[0]}{'_zero' if form[2] else ''}"}
    assert set(engine.format.split(":")[0].split("+")) <= expected
    assert engine.activations == act
    engine.vocabulary = Vocabulary(
        engine.config.vocab_size, model.tokenizer, lambda: model.weights.dense("embed")
    )
    prompt = tuple(model.tokenizer.encode(PROMPT))
    target = Target(engine.config.vocab_size, engine, model.tokenizer)

    def run(drafter: str, temperature: float, budget: int):
        request = Request(prompt, 30, temperature, 3)
        methods = [Temperature(temperature)] if temperature else []
        request = bind(methods, request, engine.vocabulary)
        built = drafters.parse(drafter).build(target)
        return Generation(engine, built, request, Fixed(budget), margins=True).run()

    for temperature in (0.0, 0.8):
        plain = run("plain", temperature, 0)
        assert plain.passes == 30
        for drafter, budget in (("recycle", 7), ("hostile", 19), ("lookup", 3)):
            assert run(drafter, temperature, budget).tokens == plain.tokens

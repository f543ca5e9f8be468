"""A longer context by other angles: what changes, what stays, and both engines agree."""

from dataclasses import replace

import numpy as np
import pytest

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.errors import ModelError, RequestError
from paceline.lm import LM
from paceline.measuring.evaluation.cache import model_identity
from paceline.models import load
from paceline.models.extension import extend_context
from tests.conftest import shared
from tests.engines.test_attention import CONFIG

FAR = replace(CONFIG, layers=CONFIG.layers[:1] * 2)


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_layers_that_see_far_are_stretched_and_windows_are_not(scaling: str) -> None:
    longer = extend_context(CONFIG, f"{scaling}:factor=2.5")
    assert longer.context == 1750
    assert longer.layers[1:] == CONFIG.layers[1:]  # they have windows
    rope, old = longer.layers[0].rope, CONFIG.layers[0].rope
    assert (rope.scaling, rope.theta, rope.dim) == (scaling, old.theta, old.dim)
    slowest = rope.frequencies[-1] / old.frequencies[-1]
    assert slowest == pytest.approx({"dynamic": 1.0}.get(scaling, 1 / 2.5), rel=1e-5)
    start, plain = rope.table(0, 20), old.table(0, 20)
    if scaling == "dynamic":
        np.testing.assert_allclose(start, plain, atol=1e-6)
    far = rope.table(1700, 1701)[0]
    assert not np.allclose(far, old.table(1700, 1701)[0])


@pytest.mark.parametrize(
    "text",
    [
        *("yarn", "yarn:factor=1", "yarn:factor=65", "yarn:factor=x", "yarn:beta=2"),
        *("ntk:factor=2", "yarn:factor=2,length=64", "dual_chunk:length=64"),
        *("dual_chunk:factor=2,length=63", "dual_chunk:factor=2,length=4e2"),
        "dual_chunk:factor=2,length=99999",
    ],
)
def test_what_is_no_extension_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"factor|unknown scaling|length of --rope is"):
        extend_context(CONFIG, text)


def test_models_that_cannot_be_extended_are_refused() -> None:
    longer = extend_context(FAR, "linear:factor=2")
    with pytest.raises(ModelError, match=r"scaled already \(linear\); leave --rope out"):
        extend_context(longer, "yarn:factor=2")
    windows = replace(CONFIG, layers=CONFIG.layers[1:])
    with pytest.raises(ModelError, match="leave --rope out"):
        extend_context(windows, "yarn:factor=2")


@pytest.mark.parametrize("scaling", ["linear", "dynamic", "yarn"])
def test_both_engines_read_beyond_the_trained_context(scaling: str) -> None:
    model = load(shared("models", "stories260K"))
    config = extend_context(model.config, f"{scaling}:factor=2")
    tokens = np.random.default_rng(0).integers(3, 512, model.config.context + 40).astype(np.int32)
    logits = []
    for name in ("native", "reference"):
        engine = open_engine(replace(model, config=config), name, weight_format="fp32")
        sequence = engine.start(tokens[:-8])
        logits.append(np.array(engine.forward([(sequence, TokenTree.chain(tokens[-8:]))])))
    np.testing.assert_allclose(*logits, atol=2e-3)


def test_requests_may_be_longer_and_drafts_change_no_token() -> None:
    source = shared("models", "stories260K")
    plain = LM(source, drafter="plain", budget=1, rope="linear:factor=2")
    drafted = LM(source, drafter="recycle", budget=8, rope="linear:factor=2")
    options = {"max_new_tokens": 560, "ignore_eos": True, "temperature": 0.0}
    one, other = (lm.generate("Once upon a time", **options) for lm in (plain, drafted))
    assert one.tokens == other.tokens
    assert len(one.tokens) == 560
    assert model_identity(plain) != model_identity(LM(source, drafter="plain", budget=1))
    with pytest.raises(RequestError, match="rope"):
        LM(source, rope=2)

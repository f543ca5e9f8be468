import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.control.base import chain
from paceline.control.min_p import MinP
from paceline.control.repetition_penalty import RepetitionPenalty
from paceline.control.temperature import Temperature
from paceline.control.top_k import TopK
from paceline.control.top_p import TopP
from paceline.errors import RequestError
from paceline.registry import controls

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

PAIRS = [
    (Temperature(0.7), lambda: processors.TemperatureLogitsWarper(0.7)),
    (TopK(5), lambda: processors.TopKLogitsWarper(5)),
    (TopP(0.8), lambda: processors.TopPLogitsWarper(0.8)),
    (MinP(0.1), lambda: processors.MinPLogitsWarper(0.1)),
    (RepetitionPenalty(1.3), lambda: processors.RepetitionPenaltyLogitsProcessor(1.3)),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda p: getattr(type(p), "name", ""))
@given(st.integers(0, 2**32 - 1))
def test_equal_to_transformers(ours, theirs, seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, 40).astype(np.float32)
    history = generator.integers(0, 40, 6).tolist()
    before = logits.copy()
    expected = theirs()(torch.tensor([history]), torch.tensor(logits)[None])[0]
    found = torch.tensor(ours.apply(logits, history))
    assert torch.equal(torch.isinf(found), torch.isinf(expected))
    assert torch.allclose(found.softmax(0), expected.softmax(0), atol=1e-6)
    assert np.array_equal(logits, before), "a control must not write to its input"


@pytest.mark.parametrize("bad", [(Temperature, 0), (TopK, 0), (TopP, 0), (TopP, 1.1), (MinP, -1)])
def test_absurd_settings_are_refused(bad):
    kind, value = bad
    with pytest.raises(RequestError, match="expected"):
        kind(value)
    with pytest.raises(RequestError, match="expected"):
        kind(float("nan"))


def test_neutral_settings_change_nothing():
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    for control in (Temperature(1.0), TopK(9), TopP(1.0), MinP(0.0), RepetitionPenalty(1.0)):
        assert np.array_equal(control.apply(logits, [1]), logits)


def test_the_chain_has_one_order():
    methods = [controls.parse(text) for text in ("min_p", "top_p:p=0.9", "temperature:value=2")]
    names = [type(m).__name__ for m in chain([*methods, RepetitionPenalty(), TopK()])]
    assert names == ["RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]

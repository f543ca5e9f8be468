import numpy as np
import pytest

from paceline.measuring.perplexity import predict
from tests.toy import ToyEngine


def test_likelihood_is_that_of_every_window():
    engine = ToyEngine(context=8)
    texts = [([1, 2, 3, 4, 5], 10), ([6, 7], 4)]
    found = predict(engine, texts, start=0, window=3)
    expected = 0.0
    for window in ([1, 2, 3], [4, 5], [6, 7]):
        seen = [0]
        for token in window:
            logits = engine.logits_after(seen).astype(np.float64)
            expected -= logits[token] - np.log(np.exp(logits).sum())
            seen.append(token)
    assert found.nats == pytest.approx(expected)
    assert (found.tokens, found.bytes) == (7, 14)
    assert found.bits_per_byte == pytest.approx(expected / np.log(2) / 14)
    assert found.perplexity == pytest.approx(np.exp(expected / 7))
    assert engine.opened == 0

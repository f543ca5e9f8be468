"""The text's law, enumerated and averaged over keys; what a watermark may not change, it does not.

As for the rejection walk: outputs of three tokens are counted, and their distance from the exact
law must be one that sampling gives in 999 of 1,000 cases.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from paceline.control.temperature import Temperature
from paceline.control.top_k import TopK
from paceline.core import Request
from paceline.decoding.walk import draw
from paceline.watermarks.base import parse_watermark

VOCAB, LENGTH, KEYS = 4, 3, 1200
TEXTS = list(itertools.product(range(VOCAB), repeat=LENGTH))
PROMPT = (1, 2, 0, 3)


class Model:
    """Random logits after every text; the same text, the same logits."""

    def __init__(self):
        self.known = {}

    def after(self, history):
        key = tuple(history)
        if key not in self.known:
            random = np.random.default_rng(key)
            self.known[key] = random.normal(0, 2, VOCAB).astype(np.float32)
        return self.known[key]


def distance(watermark, controls=()):
    """Total variation between counts over keys and the distribution, and what noise allows."""
    model, counts = Model(), dict.fromkeys(TEXTS, 0)
    plain = Request(PROMPT, LENGTH, 1.3, 7, (Temperature(1.3), *controls))
    for key in range(KEYS):
        asked = parse_watermark(f"key=k{key},{watermark}").mark(replace(plain, seed=key))
        history = list(PROMPT)
        for _ in range(LENGTH):
            history.append(draw(model.after(history), history, asked)[0])
        counts[tuple(history[len(PROMPT) :])] += 1
    probs = []
    for text in TEXTS:
        history, prob = list(PROMPT), 1.0
        for token in text:
            logits = model.after(history)
            for control in plain.controls:
                logits = control.apply(logits, history)
            weights = np.exp(logits.astype(np.float64))
            prob *= weights[token] / weights.sum()
            history.append(token)
        probs.append(prob)
    probs = np.array(probs)
    found = np.array([counts[text] for text in TEXTS])
    assert not found[probs == 0].any()
    draws = np.random.default_rng(0).multinomial(KEYS, probs, 2000) / KEYS
    return (
        np.abs(found / KEYS - probs).sum() / 2,
        np.quantile(np.abs(draws - probs).sum(1) / 2, 0.999),
    )


@pytest.mark.parametrize(
    ("watermark", "controls"),
    [
        ("kind=exponential", ()),
        ("kind=exponential,length=3", (TopK(3),)),
        ("kind=inverse", ()),
        ("kind=inverse,length=3", (TopK(3),)),
        ("kind=synthid", ()),
        ("kind=synthid,context=1,layers=8", (TopK(3),)),
    ],
)
def test_the_law_is_that_of_plain_sampling(watermark, controls):
    found, allowed = distance(watermark, controls)
    assert found < allowed < 0.15


def test_the_test_sees_a_watermark_that_does_change_the_law():
    # Over keys, green tokens are anyone: what changes is that the law is flattened.
    found, allowed = distance("kind=green,delta=4")
    assert found > 2 * allowed


def test_a_sequence_that_repeats_itself_would_change_the_law():
    """Why outputs longer than the sequence are refused: here each element is used twice."""

    class Same:
        def after(self, history):
            return np.zeros(VOCAB, np.float32)

    mark, pairs = parse_watermark("key=a,length=2"), 0
    for seed in range(200):
        asked = mark.mark(Request((0,), 2, 1.0, seed))
        asked = replace(asked, max_new_tokens=4)
        history = [0]
        for _ in range(4):
            history.append(draw(Same().after(history), history, asked)[0])
        pairs += history[1:3] == history[3:5]
    assert pairs == 200

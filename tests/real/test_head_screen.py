"""Heads of real models read in part: the tokens of whole heads, from a part of their bytes."""

from __future__ import annotations

import pytest

from paceline.engines.head_screen import HeadScreen

PROMPTS = ("The bridge was closed because", "def quicksort(values):", "Once upon a time")
SAMPLING = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.02},
)


@pytest.mark.parametrize("options", SAMPLING)
def test_tokens_are_those_of_the_whole_head(lm, options):
    model, before = lm.engine._model, lm.engine.head_screen
    screen = HeadScreen(model, "on")
    try:
        for seed, prompt in enumerate(PROMPTS):
            texts = []
            for head in (screen, HeadScreen(model, "off")):
                lm.engine.head_screen = head
                texts.append(lm.generate(prompt, max_new_tokens=24, seed=seed, **options).tokens)
            assert texts[0] == texts[1]
        assert screen.bytes
        assert screen.share is not None
    finally:
        lm.engine.head_screen = before

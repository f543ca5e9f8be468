"""A mix of prompts of many kinds, for whoever lets a chat model answer without a user."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Templates, and for each field of theirs what may stand in it.
_MIX = Path(__file__).with_name("prompt_mix.json")
_FIELD = re.compile(r"\{([a-z]+)(\d?)\}")
_NUMBERS = {"small": (2, 30), "large": (40, 900)}  # lowest value, and the one behind the highest


def mixed_prompts(seed: int = 0) -> Iterator[str]:
    """Yield prompts without end: questions, code, translation, summaries, role play, arithmetic.

    Templates take turns in a random order, their fields are drawn; the same seed gives the same
    prompts. A field that ends in a digit, as `{name2}`, is another value than `{name}`.
    """
    mix = json.loads(_MIX.read_text(encoding="utf-8"))
    templates = [template for _, template in mix.pop("templates")]
    rng = np.random.default_rng(seed)
    while True:
        for index in rng.permutation(len(templates)):
            yield _filled(templates[index], mix, rng)


def _filled(template: str, values: dict[str, list[str]], rng: np.random.Generator) -> str:
    drawn: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        field = match.group(1)
        if match.group() not in drawn:
            if field in _NUMBERS:
                text = str(rng.integers(*_NUMBERS[field]))
            else:
                others = [each for each in values[field] if each not in drawn.values()]
                text = others[rng.integers(len(others))]
            drawn[match.group()] = text
        return drawn[match.group()]

    return _FIELD.sub(value, template)

"""A mix of prompts of many kinds, for whoever lets a chat model answer without a user."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paceline.training.self_text import bare_starts

if TYPE_CHECKING:
    from paceline.lm import LM

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


def prompts_of(lm: LM, texts: Sequence[str] | None, seed: int) -> Iterable[list[int]]:
    """Return the token ids of prompts: texts, or a mix without end.

    A model without a chat template gets texts as they are, and beginnings instead of the mix.

    Args:
        lm: the model.
        texts: what users say; None for the mix.
        seed: of mix and beginnings.
    """
    tokenizer = lm.tokenizer
    chats = tokenizer.template is not None

    def encode(text: str) -> list[int]:
        if chats:
            return tokenizer.encode_chat([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    if texts is not None:
        return [encode(text) for text in texts]
    if chats:
        return map(encode, mixed_prompts(seed))
    return bare_starts(tokenizer.encode(""), lm.engine.config.vocab_size, seed)


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

"""Whether products round activations to 8 bits: measured on the model itself.

Twice as many products of 8 bits as of 16 fit an instruction, so passes over several tokens and
prompts are faster; a pass over one token waits for memory in both. Each block of 32 activations
of a token has its own scale, and blocks with most of the rounding error are rounded to 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline import _native
from paceline.core import Floats, TokenTree
from paceline.engines.formats import ACTIVATIONS
from paceline.errors import MethodError

if TYPE_CHECKING:
    from paceline.engines.base import Engine

KINDS = ["qkv", "output", "up", "down", "head"]  # of products
BOUND = 0.02  # norm of the logits' error by that of the logits, median over positions
_TOKENS = 24  # read twice to measure it: less than a hundredth of a second per 100 M weights


def choose_activations(engine: Engine, model: _native.NativeModel, act: str) -> str:
    """Set what a loaded model rounds activations to, and return it: `int16` or `int8`.

    Args:
        engine: runs `model`.
        model: takes the setting.
        act: `int16`, `int8`, or `auto` for 8 bits where the logits' error is at most `BOUND`.

    Raises:
        MethodError: 8 bits are requested, and no matrix can be multiplied with them.
    """
    wide, narrow, auto = ACTIVATIONS
    if act == wide:
        return wide
    able = model.set_byte_activations(KINDS) > 0
    if act == narrow and not able:
        raise MethodError(
            "act=int8 needs weights in GGUF blocks or in groups of integers: --format int8 or "
            "int4, or auto with a file that has them; leave it out"
        )
    if not able or (act == auto and _error(engine, model) > BOUND):
        model.set_byte_activations([])
        return wide
    return narrow


def _error(engine: Engine, model: _native.NativeModel) -> float:
    """Return what 8 bits cost: median relative error of the logits of random tokens."""
    size = min(_TOKENS, engine.config.context)
    tokens = np.random.default_rng(0).integers(0, engine.config.vocab_size, size)
    tree = TokenTree.chain(tokens.astype(np.int32))
    model.set_byte_activations([])
    exact = _logits(engine, tree)
    model.set_byte_activations(KINDS)
    missed = np.linalg.norm(_logits(engine, tree) - exact, axis=1)
    norms = np.linalg.norm(exact, axis=1)
    return float(np.median(missed / np.where(norms > 0, norms, 1)))


def _logits(engine: Engine, tree: TokenTree) -> Floats:
    sequence = engine.open()
    logits: Floats = engine.forward([(sequence, tree)]).copy()
    engine.release(sequence)
    return logits

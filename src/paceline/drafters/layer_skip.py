"""Self-speculation with some of the model's own layers left out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline import __version__
from paceline.cache_dir import cached_json
from paceline.core import Exactness, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.draft_model.self_draft import SelfDrafter, viewable
from paceline.engines.base import Engine
from paceline.engines.follower import Follower
from paceline.engines.view import View
from paceline.errors import MethodError
from paceline.registry import Source, drafters

_TEXT = 64  # tokens of the model's own text on which subsets of layers are tried
_AHEAD = 8  # tokens of it in a pass
_DRAFT = 4  # draft passes before one of the model, for which the subset should be best


@drafters.register("layer_skip", Exactness.EXACT, aliases=("layers",))
@dataclass(frozen=True, kw_only=True)
class LayerSkip(DraftSettings):
    """Draft with some of the model's layers left out, and verify with all of them.

    There is no second model and no second cache: a draft pass reads the keys and values of the
    layers that it runs. `skip=3+5` leaves out those layers. Otherwise a short search chooses them,
    once for each model: each layer is left out alone, then more and more of them, the least
    harmful first, while the rest of the model predicts a text that the whole model wrote. The
    subset that promises most is kept on disk beside the cost curves. The tree grows as that of
    `model`.

    State: as `model`. Cost of a proposal: up to `depth` passes of the layers that are left; the
    search takes twice as many passes as there are layers.
    Good for: deep models of which half still agrees with the whole. Models that were not trained
    for it rarely do; measure.

    Based on Zhang et al., Draft & Verify, arXiv 2309.08168, with a greedy search in place of its
    Bayesian optimisation.

    Attributes:
        skip: layers to leave out, counted from 0, with + between them; `none` drafts with the full
            model, so that an expensive guide runs once per tree. Default: searched.
        depth: as of `model`. Default 4: each pass costs a good part of the model.
        threshold: as of `model`. Default 0.5: from there a draft pass of half the layers pays.
        width, stop, rate: as of `model`.
    """

    source = Source(
        authors="Zhang et al.",
        title="Draft & Verify",
        arxiv="2309.08168",
        note="layers are found by a greedy search",
    )
    examples = ("layer_skip", "layer_skip:skip=1+2,stop=bandit")

    skip: str = ""
    depth: int = 4
    threshold: float = 0.5

    def build(self, target: Target) -> Drafter:
        """Return a drafter on the target's engine, after a search for layers if it needs one.

        Raises:
            MethodError: the engine cannot leave out layers, or has no such layers.
        """
        engine = viewable(target, "layer_skip", "layers")
        count = len(engine.config.layers)
        skipped = _parse(self.skip, count) if self.skip else known_skip(engine)
        kept = np.setdiff1d(np.arange(count, dtype=np.int32), skipped)
        return _LayerSkip(self, engine, View(layers=kept))


class _LayerSkip(SelfDrafter):
    origins = ("layer_skip",)

    def __init__(self, method: DraftSettings, engine: Engine, view: View) -> None:
        super().__init__(method, engine)
        self._layers = view

    def view(self, context: Tokens) -> View | None:
        return self._layers


def _parse(text: str, count: int) -> Tokens:
    if text == "none":
        return np.empty(0, np.int32)
    items = text.split("+")
    right = all(item.isascii() and item.isdecimal() and int(item) < count for item in items)
    if not right or not 0 < len(set(items)) < count:
        raise MethodError(
            f"layer_skip:skip is {text!r}, expected some of the layers 0 to {count - 1}, "
            "with + between them, or none"
        )
    return np.array(sorted(set(map(int, items))), np.int32)


def known_skip(engine: Engine, folder: Path | None = None) -> Tokens:
    """Return the layers that `search_skip` leaves out, searched unless an earlier run has done so.

    Args:
        engine: can leave out layers.
        folder: where the result is kept; see `cached_json`.
    """
    count = len(engine.config.layers)

    def parse(found: Any) -> Tokens:
        return _parse("+".join(map(str, found["skip"])), count)

    def make() -> dict[str, object]:
        return {"skip": search_skip(engine).tolist()}

    return cached_json("layers", _key(engine), make, parse, folder)


def search_skip(engine: Engine) -> Tokens:
    """Return the layers to leave out, found by twice as many passes as there are layers.

    A draft of relative cost c that is right with probability a gains (1 - a^(d+1)) / (1 - a)
    tokens in the time of 1 + c d passes (Leviathan et al., arXiv 2211.17192, theorem 3.8).
    """
    count = len(engine.config.layers)
    text = _own_text(engine, min(_TEXT, engine.config.context // 2))
    every = set(range(count))
    alone = {layer: agreement(engine, text, every - {layer}) for layer in every}
    order = sorted(every, key=lambda layer: -alone[layer])
    best, promise = order[:1], 0.0
    for size in range(1, count):
        skipped = order[:size]
        right = agreement(engine, text, every - set(skipped))
        gain = sum(right**n for n in range(_DRAFT + 1)) / (1 + _DRAFT * (count - size) / count)
        if gain > promise:
            best, promise = skipped, gain
    return np.array(sorted(best), np.int32)


def agreement(engine: Engine, text: Tokens, layers: set[int]) -> float:
    """Return how often some layers predict the next token of `text` [S], which the model wrote."""
    view = View(layers=np.array(sorted(layers), np.int32))
    follower, right = Follower(engine), 0
    try:
        for start in range(0, len(text) - 1, _AHEAD):
            tree = TokenTree.chain(text[start : start + _AHEAD])
            predicted = follower.run(text[: start + 1], tree, view).argmax(1)
            right += int((predicted[: len(text) - 1 - start] == text[start + 1 :][:_AHEAD]).sum())
    finally:
        follower.reset()
    return right / max(len(text) - 1, 1)


def _own_text(engine: Engine, length: int) -> Tokens:
    """Return what the model writes greedily after its first token."""
    tokens, follower = [engine.config.bos or 0], Follower(engine)
    try:
        while len(tokens) < length:
            context = np.array(tokens, np.int32)
            logits = follower.run(context, TokenTree.root(tokens[-1]))
            tokens.append(int(logits[0].argmax()))
    finally:
        follower.reset()
    return np.array(tokens, np.int32)


def _key(engine: Engine) -> str:
    """Tell models apart by their shape and by their logits for a few tokens."""
    sequence = engine.open()
    try:
        size = min(8, engine.config.vocab_size, engine.config.context)
        logits = engine.forward([(sequence, TokenTree.chain(np.arange(size)))])
        digest = hashlib.sha256(logits.tobytes())
    finally:
        engine.release(sequence)
    digest.update(repr((__version__, engine.format, engine.config)).encode())
    return digest.hexdigest()[:24]

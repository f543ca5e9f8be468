"""Self-speculation with some of the model's own layers."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paceline import __version__
from paceline.cache_dir import cache_folder
from paceline.core import Exactness, Tokens, TokenTree
from paceline.drafters.base import Drafter, Target
from paceline.drafters.draft_model.base import DraftSettings
from paceline.drafters.draft_model.self_draft import SelfDrafter, viewable
from paceline.engines.base import Engine
from paceline.engines.view import View
from paceline.errors import MethodError, ModelError
from paceline.models.formats.writer import write_json
from paceline.registry import Source, drafters

_TEXT = 64  # tokens of the model's own text on which subsets of layers are tried
_AHEAD = 8  # of them in a pass
_DRAFT = 4  # draft passes before one of the model, for which the subset should be best


@drafters.register("layer_skip", Exactness.EXACT, aliases=("layers",))
@dataclass(frozen=True, kw_only=True)
class LayerSkip(DraftSettings):
    """The model drafts with some of its layers left out, and checks with all of them.

    No second model and no second cache: a draft pass reads the keys and values of the layers that
    it runs. `skip=3+5` leaves out those layers; otherwise a short search finds them once for each
    model: each layer is left out alone, then ever more of them, least harmful first, while the
    model foretells a text of its own. What promises most is kept on disk beside the cost curves.
    The tree grows as that of `model`.

    State: as `model`. Cost of a proposal: up to `depth` passes of the layers that are left; the
    search takes as many passes as twice the layers.
    Good for: deep models, of which a half still agrees with the whole. Models that were not
    trained for it rarely do; measure.

    Attributes:
        skip: layers that are left out, with + between them, counted from 0; or `none`: the whole
            model drafts, for the sake of a dear guide that checks once. Default: searched.
        width: nodes that each draft pass adds. Default 4.
        depth: most draft passes for a proposal. Default 4: each costs a good part of the model.
        stop: `confidence`, `bandit` or `depth`, as of `model`.
        threshold: of `confidence`. Default 0.5: a draft pass of half the layers pays from there.
        rate: of learning the sharpness. Default 0.02.
    """

    source = Source(authors="Zhang et al.", title="Draft and Verify", arxiv="2309.08168")

    skip: str = ""
    depth: int = 4
    threshold: float = 0.5

    def build(self, target: Target) -> Drafter:
        """A drafter that knows which layers it leaves out; searches for them if it must."""
        engine = viewable(target, "layer_skip", "layers")
        count = len(engine.config.layers)
        skipped = _parse(self.skip, count) if self.skip else known_skip(engine)
        kept = np.setdiff1d(np.arange(count, dtype=np.int32), skipped)
        return _LayerSkip(self, engine, View(layers=kept))


class _LayerSkip(SelfDrafter):
    origins = ("layer_skip",)

    def __init__(self, method: DraftSettings, engine: Engine, view: View) -> None:
        super().__init__(method, engine)
        self._part = view

    def view(self, context: Tokens) -> View | None:
        return self._part


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
    """The layers that `search_skip` leaves out: read back where they were searched before.

    Args:
        engine: has the ability to leave out layers.
        folder: where they are kept; None takes the user's cache folder. One that cannot be written
            is no error.
    """
    path = (folder or cache_folder()) / f"layers-{_key(engine)}.json"
    try:
        found = json.loads(path.read_text())["skip"]
        skipped = _parse("+".join(map(str, found)), len(engine.config.layers))
    except (OSError, ValueError, KeyError, TypeError, MethodError):
        skipped = search_skip(engine)
        with contextlib.suppress(ModelError):
            write_json(path, {"skip": skipped.tolist()})
    return skipped


def search_skip(engine: Engine) -> Tokens:
    """The layers whose absence promises most, by twice as many passes as there are layers.

    A draft of cost c that is right with chance a gains (1 - a^(d+1)) / (1 - a) tokens for the time
    of 1 + c d passes (Leviathan et al., arXiv 2211.17192, theorem 3.8).
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
    """How often some layers foretell the next token of `text` [S], which the model wrote."""
    view = View(layers=np.array(sorted(layers), np.int32))
    sequence, right = engine.open(), 0
    try:
        for start in range(0, len(text) - 1, _AHEAD):
            tree = TokenTree.chain(text[start : start + _AHEAD])
            guessed = engine.forward([(sequence, tree)], view=view).argmax(1)
            right += int((guessed[: len(text) - 1 - start] == text[start + 1 :][:_AHEAD]).sum())
            engine.extend(sequence, tree.tokens)
    finally:
        engine.release(sequence)
    return right / max(len(text) - 1, 1)


def _own_text(engine: Engine, length: int) -> Tokens:
    """What the model writes, greedily, after its first token."""
    tokens = [engine.config.bos or 0]
    sequence = engine.open()
    try:
        while len(tokens) < length:
            logits = engine.forward([(sequence, TokenTree.root(tokens[-1]))])
            tokens.append(int(logits[0].argmax()))
            engine.commit(sequence, [0])
    finally:
        engine.release(sequence)
    return np.array(tokens, np.int32)


def _key(engine: Engine) -> str:
    """Tells models apart, by their shape and by what they think of a few tokens."""
    sequence = engine.open()
    try:
        size = min(8, engine.config.vocab_size, engine.config.context)
        logits = engine.forward([(sequence, TokenTree.chain(np.arange(size)))])
        digest = hashlib.sha256(logits.tobytes())
    finally:
        engine.release(sequence)
    digest.update(repr((__version__, engine.format, engine.config)).encode())
    return digest.hexdigest()[:24]

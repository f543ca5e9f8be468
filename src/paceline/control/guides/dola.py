"""DoLa: decoding by contrasting layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.abilities import Ability
from paceline.compatibility import check_needs
from paceline.control.base import require
from paceline.control.guides.base import (
    Guide,
    GuideMethod,
    Logs,
    log_softmax,
    plausible,
)
from paceline.control.guides.guide_models import GuideModels
from paceline.control.guides.guide_stream import GuidePass, GuideStream
from paceline.core import Control, Exactness, Floats, Request, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.engines.view import View
from paceline.errors import MethodError
from paceline.registry import Source, guides

_DEEP, _PART = 40, 20  # of a model deeper than 40 layers, the first or last 20


@guides.register("dola", Exactness.EXACT)
@dataclass(frozen=True, kw_only=True)
class Dola(GuideMethod):
    """Contrast the model with its own early layers: log p - log p_early.

    `early` is that candidate layer's exit whose distribution is farthest from the model's in
    Jensen-Shannon divergence. Only tokens at least alpha times as likely as the best are kept. An
    exit after the first j layers is a view of the target's own sequence, and one pass over the
    layers up to the last candidate computes them all. The authors advise a repetition penalty of
    1.2.

    Attributes:
        layers: candidate exits: `low` or `high` for every second exit of that half (of the first or
            last 20 layers, in a model of more than 40), or numbers as in 0+2; 0 is the embedding.
            Default `low`. With a tied head, `low` starts at 2 if possible, as exit 0 would repeat
            the token.
        alpha: 0 to 1. Default 0.1, the paper's.
    """

    layers: str = "low"
    alpha: float = 0.1

    order = 1
    examples = ("dola:layers=0",)
    needs = frozenset({Ability.LAYERS})
    passes = "one of the model's first j layers, j the last candidate"
    source = Source(authors="Chuang et al.", title="DoLa", arxiv="2309.03883", section="section 2")

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "dola:alpha", self.alpha, "0 to 1")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """Open a view of the target's early layers.

        Raises:
            MethodError: the engine cannot leave out layers, or the model lacks these layers.
        """
        engine = models.engine
        check_needs("the guide dola", self.needs, engine.name, engine.abilities)
        exits = candidates(self.layers, len(engine.config.layers), engine.config.tied)
        return Guide(self.edit, [_Exits(engine, exits)], request)

    def edit(self, logits: Floats, early: Floats) -> Floats:
        """Return the guided logits [V]; `early` are the candidates' logits [J, V]."""
        own, others = log_softmax(logits), log_softmax(early)
        farthest = others[int(divergence(own, others).argmax())]
        kept = plausible(logits, self.alpha)
        return np.where(kept, own - farthest, -np.inf).astype(np.float32)


class _Exits(GuideStream):
    """Gives the logits [N, J, V] after some of the first layers."""

    def __init__(self, engine: Engine, exits: list[int]) -> None:
        super().__init__(engine, engine.config.vocab_size)
        *before, last = exits
        layers = np.arange(last, dtype=np.int32)
        self._view = View(layers=layers, exits=np.array(before, np.int32) if before else None)
        self._count = len(exits)

    def lag(self, context: Tokens) -> int:
        """Return 0: the target's own sequence is used."""
        return 0

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Return 0, likewise."""
        return 0

    def length(self, context: int) -> int:
        """Return 0, likewise."""
        return 0

    @staticmethod
    def together(asked: Sequence[GuidePass]) -> list[Floats]:
        """Run several in one pass; without a target's sequence, in one that follows the text."""
        first = asked[0].stream
        assert isinstance(first, _Exits)
        entries = [
            each.stream.ready(each.context, each.tree)
            if each.target is None
            else (each.target, each.tree)
            for each in asked
        ]
        rows = first.engine.forward(entries, view=first._view)
        rows = rows.reshape(first._count, -1, first.size).swapaxes(0, 1).copy()
        return np.split(rows, np.cumsum([len(tree) for _, tree in entries])[:-1])

    def ready(self, context: Tokens, tree: TokenTree) -> tuple[Cached, TokenTree]:
        """Return sequence and tree; all of the text is committed, as views commit nothing."""
        self.follower.follow(context)
        return self.follower.ready(context, tree)


def divergence(own: Logs, others: Logs) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence of `own` [V] from each of `others` [J, V], in nats."""
    middle = np.logaddexp(own, others) - np.log(2)
    with np.errstate(invalid="ignore"):  # 0 log 0
        to_own = np.nan_to_num(np.exp(own) * (own - middle)).sum(-1)
        to_others = np.nan_to_num(np.exp(others) * (others - middle)).sum(-1)
    nats: NDArray[np.float64] = (to_own + to_others) / 2
    return nats


def candidates(text: str, count: int, tied: bool) -> list[int]:
    """Return the exits that `dola:layers` names in a model of `count` layers.

    Raises:
        MethodError: the text does not name exits of the model.
    """
    if text in ("low", "high"):
        half = _PART if count > _DEEP else count // 2
        if text == "high":
            return list(range(count - _PART if count > _DEEP else half, count, 2))
        start = 2 if tied else 0
        return list(range(start, half, 2)) or [min(start, half)]
    items = text.split("+")
    right = all(item.isascii() and item.isdecimal() and int(item) < count for item in items)
    if not right:
        raise MethodError(
            f"dola:layers is {text!r}, expected low, high, or exits from 0 to {count - 1} with + "
            "between them"
        )
    return sorted(set(map(int, items)))

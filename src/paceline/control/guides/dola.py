"""DoLa: decoding by contrasting layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    `early` is the exit, of some candidates, whose distribution is farthest from the model's by
    Jensen-Shannon divergence. Only tokens at least alpha times as likely as the best may be drawn.
    An exit behind the first j layers is a view of the target's own sequence; one pass over the
    layers of the last candidate has them all. The authors advise a repetition penalty of 1.2.

    Attributes:
        layers: candidates: `low` or `high`, every second exit of that half (of 20 layers, in a
            model deeper than 40), or numbers as in 0+2; 0 is the embedding. Default `low`. Where
            embedding and head are tied, `low` starts at 2 if it can: exit 0 would repeat the token.
        alpha: 0 to 1. Default 0.1, the paper's.
    """

    layers: str = "low"
    alpha: float = 0.1

    order = 1
    passes = "one of the model's first j layers, j the last candidate"
    source = Source(authors="Chuang et al.", title="DoLa", arxiv="2309.03883", section="section 2")

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "dola:alpha", self.alpha, "0 to 1")

    def bind(self, request: Request, models: GuideModels) -> Control:
        """With views of the target.

        Raises:
            MethodError: the engine has none, or the model no such layers.
        """
        engine = models.engine
        if "layers" not in engine.abilities:
            raise MethodError(
                f"dola needs an engine that can leave out layers, and {engine.name} cannot; "
                "use native or reference, and one model"
            )
        exits = candidates(self.layers, len(engine.config.layers), engine.config.tied)
        return Guide(self.edit, [_Exits(engine, exits)], request)

    def edit(self, logits: Floats, early: Floats) -> Floats:
        """The formula above; `early` are the candidates' logits [J, V]."""
        own, others = log_softmax(logits), log_softmax(early)
        farthest = others[int(divergence(own, others).argmax())]
        kept = plausible(logits, self.alpha)
        return np.where(kept, own - farthest, -np.inf).astype(np.float32)


class _Exits(GuideStream):
    """The logits behind some of the first layers, [N, J, V]."""

    def __init__(self, engine: Engine, exits: list[int]) -> None:
        super().__init__(engine, engine.config.vocab_size)
        *before, last = exits
        layers = np.arange(last, dtype=np.int32)
        self._view = View(layers=layers, exits=np.array(before, np.int32) if before else None)
        self._count = len(exits)

    def lag(self, context: Tokens) -> int:
        """Nothing: the target's own sequence is there."""
        return 0

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """Nothing, likewise."""
        return 0

    def length(self, context: int) -> int:
        """None, likewise."""
        return 0

    @staticmethod
    def together(asked: Sequence[GuidePass]) -> list[Floats]:
        """See `GuideStream`; without the target's sequence, in one that follows the text."""
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
        """See `GuideStream`; all of the text is committed, for views commit nothing."""
        self.follower.follow(context)
        return self.follower.ready(context, tree)


def divergence(own: Logs, others: Logs) -> NDArray[np.float64]:
    """Jensen-Shannon divergence, in nats, of log probabilities [V] from each of some [J, V]."""
    middle = np.logaddexp(own, others) - np.log(2)
    with np.errstate(invalid="ignore"):  # 0 log 0
        to_own = np.nan_to_num(np.exp(own) * (own - middle)).sum(-1)
        to_others = np.nan_to_num(np.exp(others) * (others - middle)).sum(-1)
    found: NDArray[np.float64] = (to_own + to_others) / 2
    return found


def candidates(text: str, count: int, tied: bool) -> list[int]:
    """The exits that `dola:layers` names, in a model of `count` layers.

    Raises:
        MethodError: they are none.
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

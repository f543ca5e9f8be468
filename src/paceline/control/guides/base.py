"""Contract of guides, their order, and how they find their rows of logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from paceline.compatibility import Side, check
from paceline.control.guides.guide_models import GuideModels
from paceline.control.guides.guide_stream import GuidePass, GuideStream
from paceline.core import Control, Floats, Request, Tokens, TokenTree
from paceline.engines.base import Cached, Engine
from paceline.errors import RequestError
from paceline.registry import Method, guides

Logs = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GuideMethod(Method, ABC):
    """Settings of a guide. `bind` turns them into an object that edits logits.

    Attributes:
        order: guides come before all other controls: those that contrast the model's logits with
            others 1, those that add to the result 2, those that reweight it 3. At most one each.
        passes: forward passes for each tree, in words.
    """

    order: ClassVar[int]
    passes: ClassVar[str]

    @abstractmethod
    def bind(self, request: Request, models: GuideModels) -> Control:
        """Return the guide for one request.

        Raises:
            PacelineError: a model is missing or does not fit.
        """


class Guide:
    """A guide of one request; it is `Forkable`.

    Args:
        edit: from the logits [V] and one row of each stream to the guided logits [V].
        streams: run once over each tree.
        request: whose text they follow.
        ranking_edit: `edit` at temperature 1, by which searches rank; None: the same.
    """

    append_only = False

    def __init__(
        self,
        edit: Callable[..., Floats],
        streams: Sequence[GuideStream],
        request: Request,
        ranking_edit: Callable[..., Floats] | None = None,
    ) -> None:
        self._edit, self._ranking_edit = edit, ranking_edit or edit
        self.streams, self._prompt = streams, request.prompt
        self.target: Cached | None = None
        self._context: list[int] = []
        self._tree: TokenTree | None = None  # of the rows
        self._rows: list[Floats] = []  # [N, V] for each stream

    def begin(self, sequence: Cached) -> None:
        """See `RunsModel`.

        Raises:
            RequestError: the request is running already.
        """
        if self.target is not None:
            raise RequestError(
                "a guide follows one text at a time, and this request is running; make another"
            )
        self.target = sequence

    def lag(self, context: Tokens) -> int:
        """See `RunsModel`."""
        return max(stream.lag(context) for stream in self.streams)

    def follow(self, context: Tokens, max_tokens: int | None = None) -> int:
        """See `RunsModel`."""
        return max(stream.follow(context, max_tokens) for stream in self.streams)

    def positions(self, length: int) -> list[tuple[Engine, int]]:
        """See `RunsModel`."""
        return [(stream.engine, stream.length(length)) for stream in self.streams]

    def run_tree(self, context: Tokens, tree: TokenTree) -> None:
        """See `RunsModel`."""
        run_trees_together([(self, context, tree)])

    def fork(self, context: Tokens, target: Cached | None) -> Self:
        """See `Forkable`."""
        other = copy(self)
        other.target = target
        other.streams = streams = list[GuideStream]()
        try:
            for stream in self.streams:
                streams.append(stream.fork(context))
        except BaseException:
            other.release()
            raise
        return other

    def release(self) -> None:
        """See `RunsModel`."""
        self.target = self._tree = None
        self._rows = []
        for stream in self.streams:
            stream.release()

    def apply(self, logits: Floats, history: list[int]) -> Floats:
        """Guide the logits [V] at the end of `history`; forbidden tokens stay forbidden."""
        return self._guide(logits, history, self._edit)

    def ranking_logits(self, logits: Floats, history: list[int]) -> Floats:
        """See `Forkable`."""
        return self._guide(logits, history, self._ranking_edit)

    def _guide(self, logits: Floats, history: list[int], edit: Callable[..., Floats]) -> Floats:
        node = self._node(history)
        if node is None:
            logits = (
                logits.copy()
            )  # a view of the last pass of an engine that runs again now, perhaps
            context, tree = np.array(history, np.int32), TokenTree.root(history[-1])
            self.prepare(context)
            self.keep(context, tree, [stream.run(context, tree) for stream in self.streams])
            node = 0
        guided = self.guided(logits, [rows[node] for rows in self._rows], history, edit)
        return np.where(np.isneginf(logits), logits, guided).astype(np.float32)

    def guided(
        self, logits: Floats, rows: list[Floats], history: list[int], edit: Callable[..., Floats]
    ) -> Floats:
        """Return the guided logits [V], given one row of each stream."""
        return edit(logits, *rows)

    def prepare(self, context: Tokens) -> bool:
        """Prepare to run a tree after `context` [S]; return False if nothing needs to run."""
        self._tree = None
        return True

    def keep(self, context: Tokens, tree: TokenTree, rows: list[Floats]) -> None:
        """Keep the rows [N, V] of every stream over a tree."""
        self._rows, self._context, self._tree = rows, context.tolist(), tree

    def _node(self, history: list[int]) -> int | None:
        """Return the node of the last tree at which `history` ends, or None."""
        size = len(self._context)
        if self._tree is None or history[:size] != self._context:
            return None
        node: int | None = 0
        for token in history[size:]:
            node = self._tree.child(node, token) if node is not None else None
        return node


def run_trees_together(asked: Sequence[tuple[Guide, Tokens, TokenTree]]) -> None:
    """Run several guides of one kind, each with its own text and tree, in one pass per stream.

    They are forks of one guide, or made by one method for several requests.
    """
    ready = [(guide, context, tree) for guide, context, tree in asked if guide.prepare(context)]
    if not ready:
        return
    rows = []
    for streams in zip(*(guide.streams for guide, _, _ in ready), strict=True):
        pairs = zip(streams, ready, strict=True)
        questions = [
            GuidePass(stream, context, tree, g.target) for stream, (g, context, tree) in pairs
        ]
        rows.append(streams[0].together(questions))
    for (guide, context, tree), own in zip(ready, zip(*rows, strict=True), strict=True):
        guide.keep(context, tree, list(own))


def log_softmax(logits: Floats | Logs) -> Logs:
    """Return the log-probabilities of `logits` [..., V], float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs: Logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def plausible(logits: Floats, alpha: float) -> NDArray[np.bool_]:
    """Return the tokens, bool [V], at least `alpha` times as likely as the best.

    Li et al., arXiv 2210.15097, section 3.2.
    """
    with np.errstate(divide="ignore"):
        kept: NDArray[np.bool_] = logits - logits.max() >= np.log(alpha)
    return kept


def parse_guide(text: str) -> GuideMethod:
    """Build the guide that `NAME:key=value,...` names.

    Leading values may stand without their keys, an earlier spelling.

    Raises:
        MethodError: as `Registry.parse`.
    """
    guide: GuideMethod = guides.parse(text.strip(), positional=True)
    return guide


def parse_guides(text: str) -> list[GuideMethod]:
    """Build the guides that are named in `text`, with `+` between them.

    Raises:
        MethodError: as `Registry.parse`.
    """
    text = text.strip()
    return guides.parse_several(text, positional=True) if text else [guides.parse(text)]


def guided(request: Request, methods: Sequence[GuideMethod], models: GuideModels) -> Request:
    """Return `request` with guides before its other controls, in their order.

    Raises:
        MethodError: two guides have the same `order`.
        PacelineError: a guide cannot be bound.
    """
    ordered = sorted(methods, key=lambda method: method.order)
    for a, b in pairwise(ordered):
        if a.order == b.order:
            names = [f"the guide {getattr(each, 'name', type(each).__name__)}" for each in (a, b)]
            check({Side.GUIDE: names[0], Side.OTHER_GUIDE: names[1]})
    bound = tuple(method.bind(request, models) for method in ordered)
    return replace(request, controls=(*bound, *request.controls))

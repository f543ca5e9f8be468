"""The contract of a suite: items that are scored one by one, and metrics over them."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from paceline.lm import LM

Result = dict[str, Any]  # what was measured of one item, as JSON can hold it


class Kind(StrEnum):
    """How a metric is computed from its items."""

    SHARE = "share"  # of items that are right, with a binomial error
    MEAN = "mean"  # over items
    RATIO = "ratio"  # of two sums over items


@dataclass(frozen=True)
class Metric:
    """A number over all items.

    Attributes:
        name: in tables and documents.
        kind: how it is computed.
        of: field of an item's result.
        per: field of the divisor, for a ratio.
    """

    name: str
    kind: Kind
    of: str
    per: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a result that the metric reads."""
        return (self.of,) if self.per is None else (self.of, self.per)


@dataclass(frozen=True)
class Item:
    """What is scored at once, and counts once in standard errors.

    Attributes:
        content: what the suite needs to score it.
        key: tells its content apart from that of any other item.
        group: name of the part of the suite that it belongs to; empty if there are none.
    """

    content: Any
    key: str
    group: str = ""


class Suite(ABC):
    """A benchmark.

    Attributes:
        name: in tables and documents.
        metrics: computed from the results of the items.
        generates: whether models write answers, rather than score texts.
        items: what is scored.
        batch: how many items are scored together.
    """

    name: str
    metrics: ClassVar[tuple[Metric, ...]]
    generates: ClassVar[bool] = False
    items: Sequence[Item]
    batch: ClassVar[int] = 16

    @abstractmethod
    def settings(self, lm: LM) -> dict[str, Any]:
        """Return what the scores depend on besides model and items, as JSON can hold it.

        Raises:
            RequestError: the model cannot be evaluated on the suite.
        """

    @abstractmethod
    def score(self, lm: LM, items: Sequence[Item]) -> list[Result]:
        """Return the result of each item; it depends on no other item.

        Raises:
            RequestError, ModelError: an item cannot be scored.
        """

    def is_sound(self, result: object) -> bool:
        """Return whether a stored result has the numbers that the metrics need."""
        fields = {field for metric in self.metrics for field in metric.fields}
        return isinstance(result, Mapping) and all(map(_is_finite, map(result.get, fields)))

    def compare(self, ours: Sequence[Result], base: Sequence[Result]) -> dict[str, Any]:
        """Return more that is told of two models, given the results of the same items."""
        return {}


def item_key(*content: object) -> str:
    """Return a hash of what an item consists of, JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300

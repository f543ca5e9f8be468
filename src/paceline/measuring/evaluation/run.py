"""Runs suites on a model, and compares two models item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from paceline.lm import LM
from paceline.measuring import significance
from paceline.measuring.evaluation.base import Item, Kind, Metric, Result, Suite
from paceline.measuring.evaluation.cache import ItemCache, model_identity

Tick = Callable[..., None]


@dataclass(frozen=True)
class Evaluation:
    """The results of a model on a suite.

    Attributes:
        results: of the suite's items, in order.
        settings: of the suite, for this model.
        earlier: how many results an earlier run left.
        seconds: wall time.
    """

    results: list[Result]
    settings: dict[str, Any]
    earlier: int
    seconds: float


def evaluate(
    suite: Suite,
    lm: LM,
    folder: Path | None = None,
    tick: Tick = lambda *_: None,
    fresh: bool = False,
) -> Evaluation:
    """Return the results of a model on a suite.

    Args:
        suite: its items are scored in batches.
        lm: the model.
        folder: where results are kept, so that an interrupted run goes on; None keeps none.
        tick: called with how many items were done, and whether by an earlier run.
        fresh: score items again of which there are results.

    Raises:
        RequestError, MethodError, ModelError: what is wrong, in one sentence.
    """
    start = perf_counter()
    settings = suite.settings(lm)
    identity = model_identity(lm) if folder else None
    whole = [identity, type(suite).__name__, settings]
    cache = ItemCache(folder if identity else None, whole, suite.is_sound, fresh)
    missing = [item for item in suite.items if cache.get(item.key) is None]
    earlier = len(suite.items) - len(missing)
    if earlier:
        tick(earlier, True)
    scored: dict[str, Result] = {}
    try:
        for batch in _chunks(missing, suite.batch):
            for item, result in zip(batch, suite.score(lm, batch), strict=True):
                scored[item.key] = result
                cache.put(item.key, result)
            tick(len(batch))
    finally:
        cache.flush()
    results = [scored.get(item.key) or cache.get(item.key) or {} for item in suite.items]
    return Evaluation(results, settings, earlier, perf_counter() - start)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def summary(suite: Suite, results: Sequence[Result]) -> dict[str, Any]:
    """Return each metric over all items with its standard error, as JSON can hold it."""
    return {
        metric.name: _estimate(metric, _columns(metric, results))._asdict()
        for metric in suite.metrics
    }


def group_summary(suite: Suite, results: Sequence[Result]) -> dict[str, Any]:
    """Return the summary of each group of items; empty if there are no groups."""
    groups: dict[str, list[Result]] = {}
    for item, result in zip(suite.items, results, strict=True):
        if item.group:
            groups.setdefault(item.group, []).append(result)
    return {
        name: {"items": len(group), "metrics": summary(suite, group)}
        for name, group in groups.items()
    }


def comparison(
    suite: Suite, ours: Sequence[Result], base: Sequence[Result], seed: int = 0
) -> dict[str, Any]:
    """Return each metric's difference to the base, paired by item, with tests; see `paired`."""
    metrics = {
        metric.name: paired(metric, _columns(metric, ours), _columns(metric, base), seed)
        for metric in suite.metrics
    }
    return {"metrics": metrics, **suite.compare(ours, base)}


def paired(
    metric: Metric, ours: list[list[float]], base: list[list[float]], seed: int = 0
) -> dict[str, Any]:
    """Return the difference of a metric between two models on the same items.

    Args:
        metric: says what the columns are.
        ours: columns of the metric's fields, one number an item.
        base: likewise of the base.
        seed: of the permutation test.

    Returns:
        `difference` with its standard error over items, and p values: for shares of McNemar's exact
        test with the discordant counts, else of Student's and of the sign-flip test.
    """
    parts = np.subtract(ours[0], base[0])
    if metric.kind is Kind.RATIO:
        estimate = significance.ratio_estimate(parts, ours[1])
    else:
        estimate = significance.mean_estimate(parts)
    document: dict[str, Any] = {"difference": estimate.value, "error": estimate.error}
    if metric.kind is Kind.SHARE:
        won, lost = significance.wins(ours[0], base[0])
        return {**document, "won": won, "lost": lost, "p": significance.mcnemar_test(won, lost)}
    return {
        **document,
        "p": significance.t_test(parts),
        "permutation_p": significance.sign_flip_test(parts, seed),
    }


def suite_document(
    suite: Suite, ours: Evaluation, base: Evaluation | None, seed: int = 0
) -> dict[str, Any]:
    """Return the results of a suite, and what they are paired with those of the base."""
    document: dict[str, Any] = {
        "suite": suite.name,
        "items": len(suite.items),
        "earlier": ours.earlier,
        "seconds": ours.seconds,
        "settings": ours.settings,
        "metrics": summary(suite, ours.results),
        "groups": group_summary(suite, ours.results),
    }
    if base is not None:
        document["base"] = {
            "earlier": base.earlier,
            "seconds": base.seconds,
            "settings": base.settings,
            "metrics": summary(suite, base.results),
            "groups": group_summary(suite, base.results),
        }
        document["paired"] = comparison(suite, ours.results, base.results, seed)
    return document


def _columns(metric: Metric, results: Sequence[Result]) -> list[list[float]]:
    return [[float(result[field]) for result in results] for field in metric.fields]


def _estimate(metric: Metric, columns: list[list[float]]) -> significance.Estimate:
    if metric.kind is Kind.SHARE:
        return significance.share_estimate(columns[0])
    if metric.kind is Kind.MEAN:
        return significance.mean_estimate(columns[0])
    return significance.ratio_estimate(*columns)

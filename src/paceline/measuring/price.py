"""The price of a compressed checkpoint: what it loses on texts and suites, and how fast it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paceline.engines.cost import measure_cost
from paceline.lm import LM
from paceline.machine import machine
from paceline.measuring.evaluation.base import Suite
from paceline.measuring.evaluation.run import Evaluation, evaluate, suite_document
from paceline.measuring.quality import Scores, Windows, paired

_SIZES = (1, 8, 16)  # tokens of the passes that are timed
_CONTEXT = 128  # positions before them
_REPEATS = 7


def price(
    source: str | Path,
    compressed: Path,
    windows: Windows,
    name: str,
    threads: int | None = None,
    tick: Callable[..., None] = lambda *_: None,
    suites: Sequence[Suite] = (),
    folder: Path | None = None,
) -> dict[str, Any]:
    """Return what a compressed checkpoint loses and brings against its source, for its card.

    Args:
        source: the checkpoint that it was made of.
        compressed: its folder.
        windows: of a text, on which the loss is measured.
        name: of the text.
        threads: of the engine.
        tick: called with how many windows or items of suites were done, and whether before.
        suites: that both models are evaluated on.
        folder: where results of their items are kept, so that an interrupted run goes on.

    Raises:
        RequestError: a suite does not suit the models.
    """
    found: list[tuple[dict[str, Any], Scores]] = []
    evaluated: list[list[Evaluation]] = []
    for path in (source, compressed):
        lm = LM(path, drafter="plain", budget=1, threads=threads)
        found.append(_measure(lm, windows, tick))
        evaluated.append([evaluate(suite, lm, folder, tick) for suite in suites])
        used = lm.engine.threads
        del lm
    (base, base_scores), (ours, scores) = found
    loss = paired(scores, base_scores)
    here = machine()
    return {
        "text": name,
        "windows": len(windows.tokens),
        "window": windows.tokens.shape[1],
        "machine": str(here.get("processor", here)),
        "threads": used,
        "source": base,
        "compressed": ours,
        "loss": {"nats": loss.nats, "error": loss.error, "firsts": loss.firsts},
        "suites": [
            suite_document(suite, compressed_scores, source_scores)
            for suite, source_scores, compressed_scores in zip(suites, *evaluated, strict=True)
        ],
    }


def _measure(
    lm: LM, windows: Windows, tick: Callable[[int], None]
) -> tuple[dict[str, Any], Scores]:
    scores = windows.score(lm.engine, tick)
    cost = measure_cost(lm.engine, min(_CONTEXT, lm.model.config.context // 2), _SIZES, _REPEATS)
    seconds = dict(zip(cost.nodes, cost.seconds, strict=True))
    return {
        "format": str(lm.engine.format),
        "nats": scores.mean,
        "error": scores.error,
        "bits_per_byte": scores.bits_per_byte,
        "tokens_per_second": 1 / seconds[1],
        "passes": {str(size): seconds[size] / seconds[1] for size in _SIZES[1:]},
    }, scores

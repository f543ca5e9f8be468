"""Tasks of lm-evaluation-harness, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from paceline.errors import PacelineError, RequestError, one_line
from paceline.lm import LM
from paceline.measuring.evaluation.base import Kind, Metric
from paceline.measuring.evaluation.run import paired
from paceline.measuring.significance import Estimate

PREFIX = "lm_eval:"
_SHOWN = 160  # characters of an error of the harness


@dataclass(frozen=True)
class TaskScores:
    """What the harness says of a model on one task.

    Attributes:
        metrics: by name, `METRIC` or `METRIC, FILTER`, with the harness's own standard errors.
        documents: numbers of each document, by metric; only of metrics that have one a document.
        count: number of documents.
    """

    metrics: dict[str, Estimate]
    documents: dict[str, list[float]]
    count: int


def check_harness() -> None:
    """Refuse to go on where the harness is not installed.

    Raises:
        RequestError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise RequestError(
            "--suite lm_eval:TASK needs lm-evaluation-harness: pip install 'paceline[harness]'"
        )


def run_task(
    lm: LM, task: str, limit: int | None, seed: int, folder: Path | None = None
) -> TaskScores:
    """Return the scores of a model on a task; see `PacelineLM` for what is scored.

    Args:
        lm: the model.
        task: a name that the harness knows. It may fetch the task's data.
        limit: only the first documents.
        seed: of the harness's draws, those of few-shot examples among them.
        folder: holds tasks of the user's besides those of the harness.

    Raises:
        RequestError: the harness is missing, knows no such task, or cannot run it.
    """
    check_harness()
    simple_evaluate = import_module("lm_eval").simple_evaluate
    manager = import_module("lm_eval.tasks").TaskManager(
        include_path=None if folder is None else str(folder), verbosity="ERROR"
    )
    if task not in manager.all_tasks or task in manager.all_groups:
        raise RequestError(f"lm-evaluation-harness has no single task {task!a:.80}")
    model = import_module("paceline.measuring.harness").PacelineLM(lm)
    results = _guarded(
        task,
        lambda: simple_evaluate(
            model=model,
            tasks=[task],
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        ),
    )
    return _scores(results, task)


def _guarded(task: str, run: Callable[[], Any]) -> Any:
    """Run the harness; what goes wrong in it becomes one sentence.

    Raises:
        RequestError: it could not run the task.
    """
    try:
        return run()
    except PacelineError:
        raise
    except Exception as error:  # another library's, of any kind
        kind = type(error).__name__
        raise RequestError(
            f"lm-evaluation-harness cannot run {task}: {kind}: {one_line(error):.{_SHOWN}}"
        ) from None


def _scores(results: dict[str, Any], task: str) -> TaskScores:
    found = results["results"][task]
    metrics = {}
    for key, value in found.items():
        name, comma, filter_name = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            error = found.get(f"{name}_stderr,{filter_name}")
            shown = name if filter_name == "none" else f"{name}, {filter_name}"
            known = isinstance(error, int | float)
            metrics[shown] = Estimate(float(value), float(error) if known else None)
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in results["samples"][task]:
        samples.setdefault(sample.get("filter", "none"), []).append(sample)
    documents: dict[str, list[float]] = {}
    for filter_name, rows in samples.items():
        rows.sort(key=lambda sample: sample["doc_id"])
        for name in rows[0].get("metrics", ()):
            values = [row.get(name) for row in rows]
            shown = name if filter_name == "none" else f"{name}, {filter_name}"
            if shown in metrics and all(isinstance(value, int | float) for value in values):
                documents[shown] = [float(value) for value in values if value is not None]
    count = max(map(len, samples.values()), default=0)
    return TaskScores(metrics, documents, count)


def compare_tasks(ours: TaskScores, base: TaskScores, seed: int) -> dict[str, Any]:
    """Return the difference of each metric that has a number a document, paired by document."""
    document = {}
    for name, values in ours.documents.items():
        other = base.documents.get(name)
        if other is not None and len(other) == len(values):
            hits = set(values) | set(other) <= {0.0, 1.0}
            metric = Metric(name, Kind.SHARE if hits else Kind.MEAN, name)
            document[name] = paired(metric, [values], [other], seed)
    return document

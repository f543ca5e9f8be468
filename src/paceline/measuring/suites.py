"""Known benchmarks: which categories of a prompt file make up a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paceline.errors import RequestError
from paceline.measuring.prompts import QUESTIONS, Dialogue, read_prompts

# Spec-Bench (Xia et al. 2024, section 4.1): MT-Bench's eight kinds are its first task.
_SPEC_BENCH = {
    "mt_bench": (
        *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem"),
        "humanities",
    ),
    "translation": ("translation",),
    "summarization": ("summarization",),
    "qa": ("qa",),
    "math_reasoning": ("math_reasoning",),
    "rag": ("rag",),
}
SUITES = {"spec-bench": _SPEC_BENCH}


def read_tasks(
    path: Path, limit: int | None = None, suite: str | None = None, tasks: Sequence[str] = ()
) -> list[Dialogue]:
    """Read the prompts of a file, as `read_prompts` does, with tasks for categories.

    Args:
        path: of the prompts.
        limit: largest number of lines; per task if a suite or tasks are named.
        suite: one of `SUITES`: its tasks replace the file's categories. Of the questions in this
            package only those of its categories are taken.
        tasks: only these tasks; none named takes all.

    Raises:
        RequestError: unknown suite or task, or the file is not the suite's.
    """
    if suite is None and not tasks:
        return read_prompts(path, limit)
    if suite is not None and suite not in SUITES:
        raise RequestError(f"there is no suite {suite!r}; known: {', '.join(SUITES)}")
    dialogues = read_prompts(path)
    if suite is not None and path == QUESTIONS:
        known = {category for group in SUITES[suite].values() for category in group}
        dialogues = [dialogue for dialogue in dialogues if dialogue.category in known]
    if suite is not None:
        dialogues = [_grouped(path, dialogue, suite) for dialogue in dialogues]
    found = dict.fromkeys(dialogue.category for dialogue in dialogues)
    for task in tasks:
        if task not in found:
            raise RequestError(f"{path} has no task {task!r}; it has {', '.join(found)}")
    counts: Counter[str] = Counter()
    kept = []
    for dialogue in dialogues:
        counts[dialogue.category] += 1
        chosen = not tasks or dialogue.category in tasks
        if chosen and (limit is None or counts[dialogue.category] <= limit):
            kept.append(dialogue)
    return kept


def _grouped(path: Path, dialogue: Dialogue, suite: str) -> Dialogue:
    for task, categories in SUITES[suite].items():
        if dialogue.category in categories:
            return replace(dialogue, category=task)
    raise RequestError(
        f"{path} is not of the suite {suite}: line {dialogue.line} has the category "
        f"{dialogue.category!r}"
    )

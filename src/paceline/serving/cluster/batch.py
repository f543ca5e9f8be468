"""A batch's lines on the workers of a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.data import DataContext

from paceline.serving.batch import BatchSettings, InputLine, read_lines, run_batch
from paceline.serving.worker import Worker

_SIZE = 256  # lines of a block, less where there would be few blocks
_BLOCKS = 10_000  # of an input at most
_PLACE = 0.01  # processors that Ray keeps for an engine: a replacement finds them on any full node


class LineBlock(NamedTuple):
    """Consecutive lines of a file: where they begin, the number of the line before, how many."""

    offset: int
    after: int
    lines: int


def blocks(path: Path, after: int, size: int) -> list[LineBlock]:
    """The lines of a file that come after a number, in blocks of `size`."""
    found: list[LineBlock] = []
    with path.open("rb") as file:
        number = offset = 0
        while text := file.readline():
            if number >= after and (number - after) % size == 0:
                found.append(LineBlock(offset, number, 0))
            number, offset = number + 1, offset + len(text)
            if found:
                found[-1] = found[-1]._replace(lines=found[-1].lines + 1)
    return found


def run_batch_on_cluster(
    build: Callable[[], Worker],
    replicas: int,
    path: Path,
    after: int,
    settings: BatchSettings,
    lines: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `answered`, by workers on the cluster that is joined, the lines after a number.

    A worker that dies is replaced, and its block of lines is run anew. The file is read where the
    caller is; the model's folder is wanted on each node.

    Args:
        build: makes a worker, where it is.
        replicas: their number.
        path: of the input.
        after: number of the last line that is done.
        settings: of all lines.
        lines: of the input.
    """
    size = min(_SIZE, lines // (4 * replicas))
    parts = blocks(path, after, max(size, lines // _BLOCKS, 1))
    if not parts:
        return
    here = ray.get_runtime_context().get_node_id()
    context = DataContext.get_current()
    context.enable_progress_bars = context.verbose_progress = False
    context.execution_options.preserve_order = True
    rows = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
    found = rows.map_batches(
        _read,
        batch_size=1,
        fn_args=(str(path.resolve()),),
        compute=ray.data.TaskPoolStrategy(size=2),
        num_cpus=0,
        label_selector={"ray.io/node-id": here},
    ).map_batches(
        _BatchActor,
        batch_size=None,
        fn_constructor_args=(build, settings),
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_cpus=_PLACE,
    )
    for row in found.iter_rows():
        yield int(row["number"]), json.loads(row["line"])


def _read(batch: dict[str, Any], path: str) -> dict[str, list[Any]]:
    """The lines of one block."""
    offset, after, count = (int(batch[name][0]) for name in LineBlock._fields)
    found = []
    for line in read_lines(Path(path), after, offset):
        if line.number > after + count:
            break
        found.append(line)
    return {"number": [line.number for line in found], "text": [line.text for line in found]}


class _BatchActor:
    """A worker that answers block after block."""

    def __init__(self, build: Callable[[], Worker], settings: BatchSettings) -> None:
        self._worker, self._settings = build(), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        lines = [
            InputLine(int(number), bytes(text))
            for number, text in zip(batch["number"], batch["text"], strict=True)
        ]
        found = list(run_batch(self._worker, lines, self._settings))
        return {
            "number": [number for number, _ in found],
            "line": [json.dumps(line) for _, line in found],
        }

"""Runs the lines of a batch on the workers of a Ray cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.data import DataContext

from paceline.serving.batch import BatchSettings, InputLine, read_lines, run_batch
from paceline.serving.worker import Worker

_SIZE = 256  # lines of a block, fewer if there would be few blocks
_MAX_BLOCKS = 10_000  # of an input
_CPUS = 0.01  # that Ray reserves for an engine: a replacement finds them on a full node, too


class LineBlock(NamedTuple):
    """Consecutive lines of a file.

    Attributes:
        offset: of the first line, in bytes.
        after: number of the line before it.
        lines: their number.
    """

    offset: int
    after: int
    lines: int


def blocks(path: Path, after: int, size: int) -> list[LineBlock]:
    """Divide the lines after a number into blocks of `size` lines."""
    divided: list[LineBlock] = []
    with path.open("rb") as file:
        number = offset = 0
        while text := file.readline():
            if number >= after and (number - after) % size == 0:
                divided.append(LineBlock(offset, number, 0))
            number, offset = number + 1, offset + len(text)
            if divided:
                divided[-1] = divided[-1]._replace(lines=divided[-1].lines + 1)
    return divided


def run_batch_on_cluster(
    build: Callable[[], Worker],
    replicas: int,
    path: Path,
    after: int,
    settings: BatchSettings,
    lines: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run the lines after a number as `run_batch` does, on the workers of the joined cluster.

    A worker that dies is replaced, and its block of lines is run again. The file is read on the
    caller's node; every node needs the model's folder.

    Args:
        build: makes a worker, on its node.
        replicas: their number.
        path: of the input.
        after: number of the last line that is done.
        settings: of all lines.
        lines: number of lines of the input.
    """
    size = min(_SIZE, lines // (4 * replicas))
    parts = blocks(path, after, max(size, lines // _MAX_BLOCKS, 1))
    if not parts:
        return
    here = ray.get_runtime_context().get_node_id()
    context = DataContext.get_current()
    context.enable_progress_bars = context.verbose_progress = False
    context.execution_options.preserve_order = True
    rows = ray.data.from_items([part._asdict() for part in parts], override_num_blocks=len(parts))
    outputs = rows.map_batches(
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
        num_cpus=_CPUS,
    )
    for row in outputs.iter_rows():
        yield int(row["number"]), json.loads(row["line"])


def _read(batch: dict[str, Any], path: str) -> dict[str, list[Any]]:
    """Return the lines of one block."""
    offset, after, count = (int(batch[name][0]) for name in LineBlock._fields)
    block = []
    for line in read_lines(Path(path), after, offset):
        if line.number > after + count:
            break
        block.append(line)
    return {"number": [line.number for line in block], "text": [line.text for line in block]}


class _BatchActor:
    """A worker that runs block after block."""

    def __init__(self, build: Callable[[], Worker], settings: BatchSettings) -> None:
        self._worker, self._settings = build(), settings

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        lines = [
            InputLine(int(number), bytes(text))
            for number, text in zip(batch["number"], batch["text"], strict=True)
        ]
        outputs = list(run_batch(self._worker, lines, self._settings))
        return {
            "number": [number for number, _ in outputs],
            "line": [json.dumps(line) for _, line in outputs],
        }

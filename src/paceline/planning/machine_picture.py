"""What this machine can do with a model: the roofline of its formats, T(n), the chosen point."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from paceline.decoding.governor import Governor
from paceline.errors import RequestError
from paceline.measuring.report.svg import Plot, doubling, even
from paceline.planning.candidates import STORED, weight_candidates
from paceline.planning.default_text import default_dialogues, default_text
from paceline.planning.measured_facts import EngineFacts
from paceline.planning.plan_file import kept_plan
from paceline.planning.plan_job import PlanJob, PlanQuestion
from paceline.planning.plan_report import card, report_page
from paceline.planning.setups import Goal

if TYPE_CHECKING:
    from paceline.lm import LM

_MEASURE = (
    "from paceline.measuring.bandwidth import measure_bandwidth;"
    "print(measure_bandwidth().bytes_per_second)"
)
_PATIENCE = 120.0  # seconds for a measurement of memory bandwidth
_SIZES = (4, 8, 16)  # nodes of the passes that the table shows
_POINTS = 40  # of the roofline


@dataclass(frozen=True)
class FormatRow:
    """What a format does on this machine.

    Attributes:
        format: its name; `running` is what a server runs now.
        bytes: of the weights.
        roofline: tokens a second of plain decoding if only memory bandwidth mattered.
        speed: tokens a second of a plain pass; None where it was not measured.
        passes: T(n) / T(1) by n.
        loss: nats a token against the model as stored; None where it was not measured.
        chosen: the known plan of this machine has it.
    """

    format: str
    bytes: int
    roofline: float
    speed: float | None
    passes: Mapping[int, float]
    loss: float | None
    chosen: bool


@dataclass(frozen=True)
class ModelPicture:
    """All formats of a model on this machine.

    Attributes:
        model: its name.
        bandwidth: bytes a second.
        rows: formats, the stored one first.
        chosen: setup of the known plan in words; None without a plan.
    """

    model: str
    bandwidth: float
    rows: tuple[FormatRow, ...]
    chosen: str | None

    def document(self) -> dict[str, Any]:
        """Return it, for JSON."""
        rows = [
            {**asdict(row), "passes": {str(n): times for n, times in row.passes.items()}}
            for row in self.rows
        ]
        return {
            "name": self.model,
            "bandwidth": self.bandwidth,
            "formats": rows,
            "chosen": self.chosen,
        }


def model_picture(
    model: str, bandwidth: float, say: Callable[[str], None] = lambda line: None
) -> ModelPicture:
    """Return what this machine can do with a model: the stored format is measured if it must be.

    Other formats are shown as far as `paceline plan` has measured them.

    Raises:
        PacelineError: the model cannot be read.
    """
    job = PlanJob(model, Goal(), PlanQuestion(default_dialogues(), default_text()), say=say)
    job.lab.engine(model, STORED)
    picture = _known_picture(job, model, bandwidth)
    job.measurer.close()
    return picture


def served_picture(lm: LM) -> ModelPicture:
    """Return what this machine can do with a model that is being served; no model is run.

    What the server runs now comes first, with the times of passes that its governor knows. Memory
    bandwidth is measured once, in a process of its own, so that a server keeps its memory limit.

    Raises:
        PacelineError: several models are served, or the native engine cannot read the model.
    """
    model = str(lm.model.path)
    job = PlanJob(model, Goal(), PlanQuestion(default_dialogues(), default_text()))
    bandwidth = job.lab.bandwidth(_bandwidth_of_another_process)
    picture = _known_picture(job, model, bandwidth)
    size = lm.engine.weight_bytes
    if not (isinstance(lm.budget, Governor) and size):
        return picture
    cost = lm.budget.measured()
    passes = {n: cost.at(n) / cost.at(1) for n in _SIZES}
    running = FormatRow("running", size, bandwidth / size, 1 / cost.at(1), passes, None, False)
    return replace(picture, rows=(running, *picture.rows))


def _bandwidth_of_another_process() -> float:
    command = [sys.executable, "-c", _MEASURE]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_PATIENCE)
        return float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise RequestError(f"memory bandwidth could not be measured: {error}") from None


def _known_picture(job: PlanJob, model: str, bandwidth: float) -> ModelPicture:
    """Return a picture of what has been measured."""
    source, lab = job.search.source, job.lab
    plan = kept_plan(job.measurer.model)
    chosen = None if plan is None else plan.chosen.setup
    lab.deadline = float("-inf")
    rows = []
    for each in weight_candidates(model, source.stored_bytes, source.parameters, {}, False):
        facts = lab.engine(each.path, each.format)
        if facts is None and each.format.partition(":")[0] == "ternary":
            continue  # only few models are
        loss = lab.known_loss(each.path, each.format)
        planned = chosen is not None and (chosen.model, chosen.format) == (model, each.format)
        rows.append(_row(each.format, each.bytes, facts, bandwidth, loss and loss.value, planned))
    title = None if chosen is None else chosen.title
    return ModelPicture(source.name, bandwidth, tuple(rows), title)


def _row(
    name: str,
    size: int,
    facts: EngineFacts | None,
    bandwidth: float,
    loss: float | None,
    chosen: bool,
) -> FormatRow:
    size = size if facts is None else facts.weight_bytes
    if facts is None:
        return FormatRow(name, size, bandwidth / size, None, {}, loss, chosen)
    passes = {n: facts.at(n) / facts.at(1) for n in _SIZES}
    return FormatRow(name, size, bandwidth / size, 1 / facts.at(1), passes, loss, chosen)


def picture_table(picture: ModelPicture) -> Table:
    """Return the formats as a table."""
    table = Table(box=SIMPLE, title=picture.model)
    heads = ("format", "memory", "roofline", "tokens/s", "share", *(f"T({n})" for n in _SIZES))
    for name in (*heads, "loss"):
        table.add_column(name, justify="left" if name == "format" else "right")
    for row in picture.rows:
        table.add_row(
            f"{'→ ' if row.chosen else '  '}{row.format}",
            f"{row.bytes / 1e6:,.1f} MB",
            f"{row.roofline:,.0f}",
            "–" if row.speed is None else f"{row.speed:,.0f}",
            "–" if row.speed is None else f"{row.speed / row.roofline:.0%}",
            *(f"{row.passes[n]:.2f}" if n in row.passes else "–" for n in _SIZES),
            "–" if row.loss is None else f"{row.loss:+.4f}",
        )
    return table


def picture_page(picture: ModelPicture) -> str:
    """Return the picture as an HTML page."""
    caption = (
        "The line is what memory bandwidth allows; dots are plain passes as measured, hollow ones "
        "formats that were not. Large: the format of the known plan."
    )
    cards = card("Roofline of formats", caption, _roofline(picture))
    if any(row.passes for row in picture.rows):
        caption = "A pass over n nodes, in plain passes."
        cards += card("T(n)", caption, _passes(picture))
    said = f"chosen: {picture.chosen}" if picture.chosen else "no plan yet: paceline plan makes one"
    return report_page(picture.model, said, [f'<div class="cards">{cards}</div>'])


def _roofline(picture: ModelPicture) -> str:
    sizes = [row.bytes / 1e6 for row in picture.rows]
    speeds = [row.speed or row.roofline for row in picture.rows]
    top = max(*speeds, max(row.roofline for row in picture.rows))
    plot = Plot(even("weights (MB)", [0.0, *sizes]), even("tokens/s", [0.0, top]))
    low, high = min(sizes), max(max(sizes), 1.01 * min(sizes))
    points = [low + (high - low) * n / _POINTS for n in range(_POINTS + 1)]
    plot.line([(size, picture.bandwidth / (size * 1e6)) for size in points], "cost")
    for number, (row, size, speed) in enumerate(zip(picture.rows, sizes, speeds, strict=True)):
        measured = "not measured" if row.speed is None else f"{row.speed:,.0f} tokens/s"
        tip = f"{row.format}: {size:,.1f} MB, {measured}, roofline {row.roofline:,.0f}"
        css = f"c{number % 10}" + (" hollow" if row.speed is None else "")
        plot.dot(size, speed, css, tip, 8 if row.chosen else 4)
    return plot.svg("Speed of formats against what memory bandwidth allows")


def _passes(picture: ModelPicture) -> str:
    rows = [(n, row) for n, row in enumerate(picture.rows) if row.passes]
    top = max(times for _, row in rows for times in row.passes.values())
    plot = Plot(doubling("nodes of a pass", 1, max(_SIZES)), even("plain passes", [0.0, top]))
    for number, row in rows:
        points = [(1.0, 1.0), *((float(n), times) for n, times in row.passes.items())]
        plot.line(points, f"c{number % 10}")
        for n, times in points:
            tip = f"{row.format}: {n:g} nodes take {times:.2f} plain passes"
            plot.dot(n, times, f"c{number % 10}", tip, 3)
    return plot.svg("Time of a pass against its nodes")

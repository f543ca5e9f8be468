"""Draw the loss log of a training run."""

import json
from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(log: Path, picture: Path) -> None:
    """Draw training and held-out loss against time from a JSON-lines log."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, style in (("train", "-"), ("validation", "o-")):
        points = [(record["seconds"] / 60, record[kind]) for record in records if kind in record]
        axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=kind)
    axes.set_xlabel("minutes")
    axes.set_ylabel("nats per token")
    axes.set_ylim(top=4.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=100)

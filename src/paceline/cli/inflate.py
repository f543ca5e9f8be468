"""`paceline inflate`: a small model that costs what a large one does, for measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli import options
from paceline.cli.output import document, say


def inflate(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    hidden: Annotated[int, typer.Option(min=1, help="New hidden size.")],
    layers: Annotated[int, typer.Option(min=1, help="New number of layers.")],
    heads: Annotated[int, typer.Option(min=1, help="New number of heads.")],
    kv_heads: Annotated[int, typer.Option(min=1, help="New number of key/value heads.")],
    intermediate: Annotated[int, typer.Option(min=1, help="New width of the MLP.")],
    json: options.Json = False,
) -> None:
    """Enlarge a model with zeros: same outputs, the speed of the larger shape."""
    from paceline.measuring.inflate import TargetShape
    from paceline.measuring.inflate import inflate as grow
    from paceline.models import load

    shape = TargetShape(hidden, layers, heads, kv_heads, intermediate)
    grow(load(model), out, shape)
    size = (out / "model.safetensors").stat().st_size
    if json:
        document({"path": str(out), "bytes": size})
    say(f"wrote {out}, {size / 1e6:.1f} MB")

"""`paceline doctor`: what this machine offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import check_target, document, save_text, say, show
from paceline.errors import RequestError

PrefixCacheDir = Annotated[
    Path | None, typer.Option(help="Folder of `serve --prefix-cache-dir`: show what it holds.")
]


@dataclass(frozen=True)
class PictureOptions:
    """Model."""

    html: Annotated[
        Path | None, typer.Option(help="With a model: write the picture to this HTML file, too.")
    ] = None


PicturedModel = Annotated[
    str | None,
    typer.Option(
        help="Show what this machine can do with a model: the roofline of its formats, T(n), and "
        "the point that `paceline plan` chose."
    ),
]


def doctor(
    model: PicturedModel = None,
    threads: options.Threads = None,
    prefix_cache_dir: PrefixCacheDir = None,
    *,
    pictured: PictureOptions,
    json: options.Json = False,
) -> None:
    """Show cores, instruction sets, memory bandwidth and versions, and what a model can do here."""
    html = pictured.html
    if html is not None and model is None:
        raise RequestError("--html is the picture of a model, and none is named; add MODEL")
    check_target(html)
    from paceline.machine import machine, versions
    from paceline.measuring.bandwidth import measure_bandwidth

    bandwidth = measure_bandwidth(threads)
    record: dict[str, Any] = {
        "machine": machine(),
        "threads": bandwidth.threads,
        "bandwidth": bandwidth._asdict(),
        "versions": versions(),
    }
    if prefix_cache_dir is not None:
        record["prefix_cache"] = _stored(prefix_cache_dir)
    picture = None
    if model is not None:
        from paceline.planning.machine_picture import model_picture, picture_page, picture_table

        picture = model_picture(model, bandwidth.bytes_per_second, say)
        record["model"] = picture.document()
        if html is not None:
            save_text(html, picture_page(picture))
    if json:
        document(record)
        return
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(show_header=False, box=SIMPLE)
    for name, value in record["machine"].items():
        table.add_row(name.removesuffix("_bytes").replace("_", " "), _plain(name, value))
    table.add_row("memory bandwidth", f"{bandwidth.bytes_per_second / 1e9:.1f} GB/s")
    table.add_row("threads", str(bandwidth.threads))
    if stored := record.get("prefix_cache"):
        about = (
            f"{stored['pages']} pages of {stored['models']} models, {stored['bytes'] / 1e6:,.1f} MB"
        )
        table.add_row("prefix cache", about)
    for name, version in record["versions"].items():
        table.add_row(name, version or "none")
    show(table)
    if picture is not None:
        show(picture_table(picture))


def _stored(folder: Path) -> dict[str, int]:
    """Return how much a prefix cache on disk holds.

    Raises:
        RequestError: there is no such folder.
    """
    from paceline.engines.page_folder import stored_pages

    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; name that of `serve --prefix-cache-dir`")
    files = stored_pages(folder)
    models = len({each.path.parent for each in files})
    return {"pages": len(files), "models": models, "bytes": sum(each.size for each in files)}


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value:
        return f"{value / (1 << 20):,.0f} MiB"
    return ", ".join(value) if isinstance(value, list) else str(value)

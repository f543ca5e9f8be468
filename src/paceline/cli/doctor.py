"""`paceline doctor`: what this machine offers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli import options
from paceline.cli.output import document, show
from paceline.errors import RequestError

PrefixCacheDir = Annotated[
    Path | None, typer.Option(help="Folder of `serve --prefix-cache-dir`: show what it holds.")
]


def doctor(
    threads: options.Threads = None,
    prefix_cache_dir: PrefixCacheDir = None,
    json: options.Json = False,
) -> None:
    """Show cores, instruction sets, memory bandwidth and versions."""
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


def _stored(folder: Path) -> dict[str, int]:
    """Return how much a prefix cache on disk holds.

    Raises:
        RequestError: there is no such folder.
    """
    from paceline.engines.page_folder import stored_files

    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; name that of `serve --prefix-cache-dir`")
    files = stored_files(folder)
    models = len({each.path.parent for each in files})
    return {"pages": len(files), "models": models, "bytes": sum(each.size for each in files)}


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value:
        return f"{value / (1 << 20):,.0f} MiB"
    return ", ".join(value) if isinstance(value, list) else str(value)

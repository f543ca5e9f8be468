"""`paceline doctor`: what this machine offers."""

from __future__ import annotations

from typing import Any

from paceline.cli import options
from paceline.cli.output import document, show


def doctor(threads: options.Threads = None, json: options.Json = False) -> None:
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
    for name, version in record["versions"].items():
        table.add_row(name, version or "none")
    show(table)


def _plain(name: str, value: Any) -> str:
    if name.endswith("_bytes") and value:
        return f"{value / (1 << 20):,.0f} MiB"
    return ", ".join(value) if isinstance(value, list) else str(value)

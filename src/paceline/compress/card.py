"""What is told of a compressed checkpoint: `card.json`, and the same as text in `card.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paceline
from paceline.models.formats.writer import write_bytes

if TYPE_CHECKING:
    from paceline.compress.calibrate import Calibration
    from paceline.compress.checkpoint import Size
    from paceline.compress.job import CompressionJob


def describe(
    job: CompressionJob, texts: Calibration, size: Size, seconds: float, peak: int
) -> dict[str, Any]:
    """Return the card of a finished job, without loss and speed.

    Args:
        job: with source, target and recipe.
        texts: that it was calibrated on.
        size: of what was written.
        seconds: that it took.
        peak: largest resident memory, in bytes.
    """
    used = job.recipe.needs_data
    return {
        "name": job.out.name,
        "version": paceline.__version__,
        "recipe": str(job.recipe),
        "source": {
            "name": job.model.name,
            "fingerprint": job.model.fingerprint(),
            "bytes": job.model.weights.nbytes(),
        },
        "calibration": {
            "origin": texts.origin if used else "not used: no method looks at data",
            "rows": len(texts.tokens),
            "length": texts.tokens.shape[1],
            "digest": texts.digest(),
        },
        "size": {**asdict(size), "bits_per_weight": size.bits_per_weight},
        "notes": job.notes,
        "seconds": seconds,
        "peak_bytes": peak,
    }


def card_path(out: Path, suffix: str = ".md") -> Path:
    """Return where a card is: `card.md` in a folder, `NAME.card.md` beside the file `NAME.gguf`."""
    if out.suffix == ".gguf":
        return out.with_name(f"{out.stem}.card{suffix}")
    return out / f"card{suffix}"


def write_card(out: Path, card: Mapping[str, Any]) -> None:
    """Write both forms of the card of a folder or a GGUF file.

    Raises:
        ModelError: they cannot be written.
    """
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    write_bytes(card_path(out, ".json"), text.encode())
    write_bytes(card_path(out), as_markdown(card).encode())


def as_markdown(card: Mapping[str, Any]) -> str:
    """Return a card as text."""
    size, source = card["size"], card["source"]
    lines = [
        f"# {card['name']}",
        "",
        f"{source['name']} compressed by Paceline {card['version']}: `{card['recipe']}`.",
        "",
        f"- Calibrated on {card['calibration']['rows']} texts of {card['calibration']['length']} "
        f"tokens ({card['calibration']['origin']}).",
        f"- {size['total'] / 1e6:.1f} MB, of the source's {source['bytes'] / 1e6:.1f} MB; "
        f"{size['bits_per_weight']:.2f} bits for a weight of the layers, scales and all told.",
        f"- Compressed in {card['seconds']:.0f} s with at most {card['peak_bytes'] / 1e9:.2f} GB "
        "of memory.",
        *(f"- {note}" for note in card.get("notes", ())),
    ]
    if price := card.get("price"):
        loss = price["loss"]
        lines += [
            "",
            "## What it costs and brings",
            "",
            f"Paired over {price['windows']} windows of {price['window']} tokens of "
            f"{price['text']}; {price['machine']}, {price['threads']} threads.",
            "",
            "| | nats a token | bits a byte | tokens/s, plain | pass of 8 | pass of 16 |",
            "|---|---:|---:|---:|---:|---:|",
            _row("source", price["source"]),
            _row("compressed", price["compressed"]),
            "",
            f"It loses {loss['nats']:.4f} nats a token (standard error {loss['error']:.4f}); the "
            f"most likely token is the same at {loss['firsts']:.1%} of the positions.",
            *_suites(price.get("suites", ())),
        ]
    return "\n".join(lines) + "\n"


def _suites(suites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table of benchmark suites, each metric with its paired difference."""
    if not suites:
        return []
    lines = [
        "",
        "| suite | metric | items | source | compressed | paired difference | p |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for suite in suites:
        prefix = suite["settings"].get("prefix")
        title = f"{suite['suite']}, prefix `{prefix}`" if prefix else str(suite["suite"])
        for name, value in suite["metrics"].items():
            difference = suite["paired"]["metrics"][name]
            p = "" if difference["p"] is None else f"{difference['p']:.3g}"
            base = suite["base"]["metrics"][name]
            lines.append(
                f"| {title} | {name} | {suite['items']} | {_estimate(base)} | {_estimate(value)} | "
                f"{_estimate({**difference, 'value': difference['difference']}, '+')} | {p} |"
            )
    return lines


def _estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    value, error = estimate["value"], estimate["error"]
    return f"{value:{sign}.4f}" if error is None else f"{value:{sign}.4f} ± {error:.4f}"


def _row(name: str, one: Mapping[str, Any]) -> str:
    passes = [f"{one['passes'][size]:.2f}" if size in one["passes"] else "" for size in ("8", "16")]
    return (
        f"| {name}, {one['format']} | {one['nats']:.4f} | {one['bits_per_byte']:.4f} | "
        f"{one['tokens_per_second']:.1f} | {passes[0]} | {passes[1]} |"
    )

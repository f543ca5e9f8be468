r"""Draw what `frontier.py` and `peers.py` kept in a cache: bytes, loss and speed, as an HTML page.

    python benchmarks/compression/plot.py CACHE.json [--out frontier.html]

Each model has a page section: loss against bytes and, where results were made with `--speed`, loss
against tokens a second. Seeds of a base are averaged (`NAME-0` and `NAME-1` are seeds of NAME). The
line joins the results that no other one beats in both directions. Colours are methods: recipes
without their settings, and llama.cpp.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.measuring.report.frame import frame
from paceline.measuring.report.html import number
from paceline.measuring.report.svg import Plot, clean, doubling, even

COLOURS = 10  # classes of the page
LEAST = 2.0**-10  # nats; smaller losses, and gains, are drawn there
_FIELDS = ("bits", "bytes", "nats", "error", "firsts")


@dataclass(frozen=True)
class Result:
    """The mean of a recipe over seeds.

    Attributes:
        model: name of the base without its seed.
        recipe: of ours, or `llama.cpp` and a type.
        texts: of calibration, with their number.
        seeds: how many were averaged.
        bits, bytes, nats, error, firsts: as in the cache.
        speed: tokens a second; None where a seed has none.
    """

    model: str
    recipe: str
    texts: str
    seeds: int
    bits: float
    bytes: float
    nats: float
    error: float
    firsts: float
    speed: float | None

    @property
    def method(self) -> str:
        """The recipe without settings."""
        if self.recipe.startswith("llama.cpp"):
            return "llama.cpp"
        return "+".join(step.partition(":")[0] for step in self.recipe.split("+"))

    @property
    def tip(self) -> str:
        """What is shown where a mark is pointed at."""
        fast = "" if self.speed is None else f", {self.speed:.0f} tokens/s"
        return (
            f"{self.recipe} ({self.texts}): {self.bits:.2f} bits, {self.bytes / 1e6:.1f} MB, "
            f"{self.nats:.4f} ± {self.error:.4f} nats{fast}"
        )


def read(cache: Path) -> list[Result]:
    """Return the results of a cache, the smallest first.

    Raises:
        SystemExit: it cannot be read, or holds none.
    """
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for key, row in known.items():
            base, recipe, windows, texts, rows, *_ = json.loads(key)
            model = Path(base).name.rpartition("-")[0] or Path(base).name
            texts = f"{rows} {texts} texts, {windows} windows"
            groups.setdefault((model, recipe, texts), []).append(row)
        results = [_mean(*names, rows) for names, rows in groups.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{cache} is no cache of frontier.py or peers.py: {error}") from None
    if not results:
        raise SystemExit(f"{cache} holds no results; run frontier.py --cache {cache} first")
    return sorted(results, key=lambda each: each.bytes)


def _mean(model: str, recipe: str, texts: str, rows: Sequence[Mapping[str, Any]]) -> Result:
    mean = {name: float(np.mean([row[name] for row in rows])) for name in _FIELDS}
    speeds = [row.get("tokens_per_second") for row in rows]
    fast = None if None in speeds else float(np.mean(speeds))
    return Result(model, recipe, texts, len(rows), **mean, speed=fast)


def unbeaten(results: Sequence[Result], price: Callable[[Result], float]) -> list[Result]:
    """Return the results that lose less than all that cost as little, the cheapest first."""
    kept: list[Result] = []
    for each in sorted(results, key=lambda each: (price(each), each.nats)):
        if not kept or each.nats < kept[-1].nats:
            kept.append(each)
    return kept


def bytes_plot(results: Sequence[Result], colours: Mapping[str, str]) -> str:
    """Plot loss against bytes."""
    sizes = [each.bytes / 1e6 for each in results]
    plot = Plot(even("MB", sizes), _losses(results))
    line = unbeaten(results, lambda each: each.bytes)
    plot.line([(each.bytes / 1e6, _shown(each)) for each in line], "even")
    for each, size in zip(results, sizes, strict=True):
        plot.dot(size, _shown(each), colours[each.method], each.tip)
    return plot.svg("Nats lost against megabytes")


def speed_plot(results: Sequence[Result], colours: Mapping[str, str]) -> str:
    """Plot loss against tokens a second, of results that have one."""
    timed = [(each.speed, each) for each in results if each.speed is not None]
    plot = Plot(even("tokens a second", [fast for fast, _ in timed]), _losses(results))
    line = unbeaten([each for _, each in timed], lambda each: -(each.speed or 0))
    plot.line([(each.speed or 0, _shown(each)) for each in line], "even")
    for fast, each in timed:
        plot.dot(fast, _shown(each), colours[each.method], each.tip)
    return plot.svg("Nats lost against tokens a second")


def _losses(results: Sequence[Result]) -> Any:
    shown = [_shown(each) for each in results]
    return doubling("nats a token lost", min(shown), max(shown))


def _shown(result: Result) -> float:
    return max(result.nats, LEAST)


def page(results: Sequence[Result]) -> str:
    """Return the page of all results."""
    models = list(dict.fromkeys(each.model for each in results))
    sections = [part for model in models for part in _sections(model, results)]
    facts = f"{len(results)} results of frontier.py and peers.py; losses are paired with the base."
    return frame("Paceline: compression", "Bytes, loss and speed", facts, sections)


def _sections(model: str, every: Sequence[Result]) -> Iterator[str]:
    results = [each for each in every if each.model == model]
    methods = list(dict.fromkeys(each.method for each in results))
    colours = {name: f"c{place % COLOURS}" for place, name in enumerate(methods)}
    keys = "".join(f'<span class="key {colours[name]}">{clean(name)}</span>' for name in methods)
    drawings = [("Bytes and loss", bytes_plot(results, colours))]
    if any(each.speed is not None for each in results):
        drawings.append(("Speed and loss", speed_plot(results, colours)))
    cards = "".join(
        f'<section class="card"><h2>{clean(model)}: {title}</h2>'
        f'<p>The line joins what nothing else beats.</p>{drawing}<div class="legend">{keys}</div>'
        "</section>"
        for title, drawing in drawings
    )
    yield f'<div class="cards">{cards}</div>'
    yield _table(model, results)


def _table(model: str, results: Sequence[Result]) -> str:
    heads = ("recipe", "texts", "seeds", "bits", "MB", "nats", "±", "first choices", "tokens/s")
    top = "".join(f"<th>{head}</th>" for head in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(e))}</tr>" for e in results)
    return (
        f'<section class="wide"><h2>{clean(model)}</h2><div class="scroll"><table><thead><tr>{top}'
        f"</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _cells(each: Result) -> Iterator[str]:
    yield from (clean(each.recipe), clean(each.texts), str(each.seeds))
    yield number(each.bits, ".2f")
    yield f'<data value="{each.bytes!r}">{each.bytes / 1e6:,.1f}</data>'
    yield from (number(each.nats, ".4f"), number(each.error, ".4f"), number(each.firsts, ".3f"))
    yield number(each.speed, ".0f")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--out", type=Path, default=Path("frontier.html"))
    options = parser.parse_args()
    results = read(options.cache)
    options.out.write_text(page(results), encoding="utf-8")
    print(f"wrote {options.out}: {len(results)} results")


if __name__ == "__main__":
    main()

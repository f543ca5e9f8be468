"""A hint for weights that are stored in fp32: what a smaller format would bring and cost here."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paceline.cli.output import say
from paceline.errors import PacelineError

if TYPE_CHECKING:
    from paceline.engines.base import Engine
    from paceline.lm import LM

_CANDIDATES = ("int8", "int4")
_SMALLEST, _LARGEST = 64 << 20, 4 << 30  # bytes of weights for which it is said, and measured
_TOKENS = 128  # of the text whose perplexity is compared
_TEXT = (
    "A river begins as a small stream in the mountains, fed by rain, melting snow or a spring. On "
    "its way down it is joined by other streams, grows wider and slower, and carries sand and "
    "stones to the plain. Towns were built beside rivers because they gave water to drink, fish to "
    "eat and a way to travel. Where a river meets the sea it drops what it has carried, and over "
    "thousands of years a flat and fertile land is made, which is called a delta. Dams store water "
    "for dry months and turn its fall into electricity, but they also keep fish from the places "
    "where they lay their eggs."
)


class FormatNumbers(NamedTuple):
    """What a format does on this machine.

    Attributes:
        name: of the format.
        speed: tokens per second of plain decoding.
        size: bytes of the weights.
        nats: mean negative log-probability of a token of a short text.
    """

    name: str
    speed: float
    size: int
    nats: float


def hint_formats(lm: LM, requested: str, folder: Path | None = None) -> None:
    """Say what smaller formats would bring to weights that are fp32 only as stored.

    The numbers are measured once and kept in the cache folder. Without a terminal nothing is
    measured, and nothing is said unless it was measured before.

    Args:
        lm: the model.
        requested: the format that was asked for; `auto` is none.
        folder: where the numbers are kept; see `cached_json`.
    """
    engine = lm.engine
    size = engine.weight_bytes or 0
    if requested != "auto" or engine.name != "native" or engine.format != "fp32":
        return
    if not _SMALLEST <= size <= _LARGEST:
        return
    from paceline.cache_dir import cache_folder, cached_json

    key = _key(lm)
    known = ((folder or cache_folder()) / f"formats-{key}.json").exists()
    if not known and not sys.stderr.isatty():
        return

    def make() -> list[Any]:
        say("measuring once what smaller formats would bring; --format fp32 leaves this out")
        return [list(numbers) for numbers in _measure(lm)]

    try:
        rows = cached_json("formats", key, make, _parse, folder)
    except KeyboardInterrupt:
        say("not measured")
        return
    except ValueError:  # no smaller format is for this model
        return
    say(sentence(rows))


def sentence(rows: list[FormatNumbers]) -> str:
    """Return the hint; the first row is that of the stored format."""
    stored, *others = rows
    parts = [
        f"--format {each.name}: {each.speed:.0f} tokens/s, {each.size / 1e6:,.0f} MB, perplexity "
        f"{math.expm1(each.nats - stored.nats):+.1%} on a short text"
        for each in others
    ]
    return (
        f"the weights are {stored.name} as stored: {stored.speed:.0f} tokens/s, "
        f"{stored.size / 1e6:,.0f} MB here; {'; '.join(parts)}; they round the weights, so outputs "
        f"change, and --format {stored.name} leaves this line out"
    )


def _measure(lm: LM) -> list[FormatNumbers]:
    from paceline.engines import open_engine

    tokens = lm.tokenizer.encode(_TEXT)[: min(_TOKENS, lm.engine.config.context)]
    rows = [_numbers(lm.engine.format, lm.engine, tokens)]
    for name in _CANDIDATES:
        try:
            engine = open_engine(lm.model, "native", threads=lm.engine.threads, weight_format=name)
        except PacelineError:  # not for this model
            continue
        rows.append(_numbers(name, engine, tokens))
    return rows


def _numbers(name: str, engine: Engine, tokens: list[int]) -> FormatNumbers:
    from paceline.engines.cost import measure_cost
    from paceline.scoring import score_tokens

    [seconds] = measure_cost(engine, 8, (1,), repeats=5, pick=min).seconds
    score = score_tokens(engine, tokens)
    return FormatNumbers(
        name, 1 / float(seconds), int(engine.weight_bytes or 0), -score.total / (len(tokens) - 1)
    )


def _parse(found: Any) -> list[FormatNumbers]:
    rows = [
        FormatNumbers(str(name), float(speed), int(size), float(nats))
        for name, speed, size, nats in found
    ]
    if len(rows) < 2:
        raise ValueError("no format to compare with")
    return rows


def _key(lm: LM) -> str:
    from paceline import __version__
    from paceline.machine import machine

    engine = lm.engine
    path = lm.model.path.resolve()
    parts = (__version__, machine(), str(path), path.stat().st_mtime_ns, engine.threads)
    return hashlib.sha256(repr((*parts, engine.config)).encode()).hexdigest()[:24]

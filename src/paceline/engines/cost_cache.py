"""T(n) kept between runs, by machine, model, formats, threads and version."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from paceline import __version__
from paceline.cache_dir import cached_json
from paceline.core import Cost
from paceline.engines.base import Engine
from paceline.engines.cost import measure_cost
from paceline.machine import machine

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
# Where weights stream from disk or layers lie on other nodes, a pass takes long, and its time
# hardly depends on its size.
_STREAMED_SIZES = (1, 8, 16, 32, 64, 96, 128)
_MIN_STREAMED = 32  # nodes up to which it is measured, however large the logits are
_STREAMED_REPEATS = 5  # passes of a size, at most: the speed of a disk or a network varies
_STREAMED_LOGITS = 10_000_000  # of a pass at most: 40 MB, where memory is short
_CHECKED = (1, 8)  # sizes of the passes that are run anew
_CLEARLY, _RESOLUTION = 0.85, 2e-4  # share of the known time, and seconds, by which they are faster
_USEFUL = 5.0  # no tree is expected to gain so many tokens
_SECONDS = 1.0
_CONTEXT = 8  # committed positions: short, since they are run for every measurement


_known: WeakKeyDictionary[Engine, Cost] = WeakKeyDictionary()


def cost_of(engine: Engine) -> Cost:
    """Return T(n) of an engine; measured or checked when it is first asked for.

    Raises:
        PacelineError: as the engine does.
    """
    if engine not in _known:
        _known[engine] = known_cost(engine)
    return _known[engine]


def known_cost(engine: Engine, folder: Path | None = None) -> Cost:
    """Return T(n) of an engine, measured unless an earlier run has done so.

    A curve that was measured on a busy machine is replaced: some passes are run anew, and where
    they take clearly less than it says, so are all. Where weights stream from disk, passes correct
    the curve while they generate. Where layers lie on other nodes it is measured each time: it is
    that of the network today.

    Args:
        engine: shape, format and threads decide the time; the values of its weights do not.
        folder: where curves are kept; see `cached_json`.
    """
    fresh = False
    if engine.remote_layers:
        return _rising(_measure(engine))

    def make() -> dict[str, object]:
        nonlocal fresh
        fresh, cost = True, _rising(_measure(engine))
        return {"nodes": cost.nodes, "seconds": list(cost.seconds)}

    def parse(found: Any) -> Cost:
        return Cost(tuple(map(int, found["nodes"])), tuple(map(float, found["seconds"])))

    key = _key(engine)
    cost = cached_json("cost", key, make, parse, folder)
    if fresh or engine.streamed_bytes or not _outdated(engine, cost):
        return cost
    return cached_json("cost", key, make, parse, folder, renew=True)


def _rising(cost: Cost) -> Cost:
    """Return a curve in which more nodes never take less."""
    rising = np.minimum.accumulate(cost.seconds[::-1])[::-1]
    return Cost(cost.nodes, tuple(rising.tolist()))


def _outdated(engine: Engine, cost: Cost) -> bool:
    """Return whether passes take clearly less time now than when the curve was measured.

    More says nothing: other work may slow them down now.
    """
    sizes = tuple(n for n in _CHECKED if n <= cost.nodes[-1])
    now = measure_cost(engine, _CONTEXT, sizes, repeats=2, pick=min)
    pairs = zip(now.seconds, map(cost.at, sizes), strict=True)
    return any(seconds < _CLEARLY * known - _RESOLUTION for seconds, known in pairs)


def _measure(engine: Engine) -> Cost:
    """Measure T(n) in about a second, where kernels take a step, up to what can ever pay."""
    if engine.streamed_bytes or engine.remote_layers:
        return measure_streamed(engine)
    times: list[float] = []
    for size in _SIZES:
        times += measure_cost(engine, _CONTEXT, (size,), repeats=1).seconds
        if times[-1] > _USEFUL * times[0]:
            break
    repeats = int(min(max(_SECONDS / sum(times), 2), 9))
    # The shortest time: the result must not depend on what else ran just then.
    return measure_cost(engine, _CONTEXT, _SIZES[: len(times)], repeats, pick=min)


def measure_streamed(engine: Engine, seconds: float = _SECONDS) -> Cost:
    """Measure T(n) where a pass waits for a disk or a network: medians of passes that take turns.

    Args:
        engine: reads weights from disk in each pass, or has layers on other nodes.
        seconds: that it may take; each size runs at least once, and at most five times.
    """
    fitting = max(_STREAMED_LOGITS // engine.config.vocab_size, _MIN_STREAMED)
    sizes = tuple(n for n in _STREAMED_SIZES if n <= fitting)
    times: list[float] = []
    for size in sizes:
        warmups = int(size == 1)
        times += measure_cost(engine, _CONTEXT, (size,), repeats=1, warmups=warmups).seconds
        if times[-1] > _USEFUL * times[0]:
            break
    sizes = sizes[: len(times)]
    repeats = int(min(seconds / sum(times), _STREAMED_REPEATS))
    if repeats < 2:  # a single further one would say no more
        return Cost(sizes, tuple(times))
    return measure_cost(engine, _CONTEXT, sizes, repeats, warmups=0)


def _key(engine: Engine) -> str:
    threads = engine.threads
    formats = (engine.format, engine.kv_format)
    members = [member.config for member in getattr(engine, "members", ())]
    parts = (
        *(__version__, machine(), engine.name, formats, engine.pattern),
        *(threads, engine.config, members),
        *((engine.streamed_bytes,) if engine.streamed_bytes else ()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

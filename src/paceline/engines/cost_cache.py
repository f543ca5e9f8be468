"""T(n) kept between runs, by machine, model, formats, threads and version."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from paceline import __version__
from paceline.cache_dir import cache_folder
from paceline.core import Cost
from paceline.engines.base import Engine
from paceline.engines.cost import measure_cost
from paceline.errors import ModelError
from paceline.machine import machine
from paceline.models.formats.writer import write_json

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
_USEFUL = 5.0  # no tree is expected to gain so many tokens
_SECONDS = 1.0
_CONTEXT = 8  # committed positions: short, since they are run for every measurement


def known_cost(engine: Engine, folder: Path | None = None) -> Cost:
    """T(n) of an engine: read back where it was measured before, else measured and kept.

    Args:
        engine: shape, format and threads decide the time; the values of its weights do not.
        folder: where curves are kept; None takes `paceline` in the user's cache folder. A folder
            that cannot be written is no error: the curve is measured again next time.
    """
    path = (folder or cache_folder()) / f"cost-{_key(engine)}.json"
    try:
        found = json.loads(path.read_text())
        return Cost(tuple(map(int, found["nodes"])), tuple(map(float, found["seconds"])))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    cost = _measure(engine)
    rising = np.minimum.accumulate(cost.seconds[::-1])[::-1]  # more nodes never take less
    cost = Cost(cost.nodes, tuple(map(float, rising)))
    with contextlib.suppress(ModelError):
        write_json(path, {"nodes": cost.nodes, "seconds": cost.seconds})
    return cost


def _measure(engine: Engine) -> Cost:
    """T(n) in about a second, at every size where kernels take a step, up to what can ever pay."""
    times: list[float] = []
    for size in _SIZES:
        times += measure_cost(engine, _CONTEXT, (size,), repeats=1).seconds
        if times[-1] > _USEFUL * times[0]:
            break
    repeats = int(min(max(_SECONDS / sum(times), 2), 9))
    # The least time: what is kept must not depend on what else ran just then.
    return measure_cost(engine, _CONTEXT, _SIZES[: len(times)], repeats, pick=min)


def _key(engine: Engine) -> str:
    threads = engine.threads
    formats = (engine.format, engine.kv_format)
    members = [member.config for member in getattr(engine, "members", ())]
    parts = (__version__, machine(), engine.name, formats, threads, engine.config, members)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]

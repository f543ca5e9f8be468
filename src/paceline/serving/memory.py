"""How much of a process's memory keys and values may take, so that it keeps a promise."""

from __future__ import annotations

from paceline.engines.base import Engine
from paceline.errors import RequestError
from paceline.measuring.memory import peak_bytes

_SPARE = 64 * 2**20  # connections, drafters, parsers, and what the allocator wastes
_ROWS = 512  # nodes of a pass, as a rule at most; their logits are there twice
_FEWEST = 4  # pages


def room(total: int, engine: Engine) -> int:
    """Bytes for keys and values, those of past texts included, in a process of `total` bytes.

    What the process has held at most so far, the weights among it, is measured; 64 MiB and the
    logits of 512 nodes, twice, are left free.

    Raises:
        RequestError: too little is left.
    """
    held, page = peak_bytes(), engine.memory.page_bytes
    spare = _SPARE + 2 * _ROWS * engine.config.vocab_size * 4
    left = total - held - spare
    if left < _FEWEST * page:
        least = held + spare + _FEWEST * page
        raise RequestError(
            f"{total / 1e6:.0f} MB of memory cannot hold it: the model takes {held / 1e6:.0f} MB, "
            f"work on it {spare / 1e6:.0f} MB, and {least / 1e6:.0f} MB is the least that can run"
        )
    return left

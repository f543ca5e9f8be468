"""Where the native engine keeps layers that do not fit into the memory for weights."""

from __future__ import annotations

import os
from secrets import token_hex

from paceline import _native
from paceline.cache_dir import cache_folder
from paceline.errors import ModelError

_LARGEST = 1 << 62  # bytes: more is no limit


def stream_weights(model: _native.NativeModel, budget: int) -> None:
    """Let a model keep at most `budget` bytes of weights in memory; before it has any.

    Other layers go to a file in the user's cache folder, which has no name while it is open and
    vanishes with the process. The file lies on a disk, not in memory, for this to be of use.

    Raises:
        ModelError: the folder cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"weights-{os.getpid()}-{token_hex(4)}.tmp"
        model.stream_weights(str(path), min(max(budget, 0), _LARGEST))
    except (OSError, _native.WeightFileError) as error:
        raise ModelError(
            f"layers cannot stream from {folder}: {error}; set XDG_CACHE_HOME to a folder that can "
            "be written"
        ) from None

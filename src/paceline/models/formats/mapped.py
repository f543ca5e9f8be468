"""Arrays that are views of mapped files."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def is_mapped(values: NDArray[Any]) -> bool:
    """Return whether an array is a view of a mapped file."""
    return _mapping(values) is not None


def free_pages(arrays: Iterable[NDArray[Any]]) -> None:
    """Take what was read of mapped files out of memory; it is read again where it is used again.

    The system would only do so once memory is short, and counts it as the process's until then.
    Does nothing where the system has no such call.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    found = {id(each): each for each in map(_mapping, arrays) if each is not None}
    for each in found.values():
        each.madvise(mmap.MADV_DONTNEED)


def _mapping(values: NDArray[Any]) -> mmap.mmap | None:
    """Return the mapped file that an array is a view of."""
    while isinstance(values.base, np.ndarray):
        values = values.base
    return values.base if isinstance(values.base, mmap.mmap) else None

"""Sizes of a checkpoint and of its cache that are known before anything is loaded."""

from __future__ import annotations

import numpy as np

from paceline import _native
from paceline.engines.native import KV_FORMATS
from paceline.models import Model


def page_bytes(model: Model) -> dict[str, int]:
    """Return the bytes of a page of the native engine's cache, by format; nothing is loaded."""
    sizes = {}
    for name in KV_FORMATS:
        empty = _native.NativeModel(model.config, "fp32", "fp32", name, "", 1)
        sizes[name] = int(empty.page_bytes)
    return sizes


def parameters(model: Model) -> int:
    """Return the number of weights in matrices; nothing is read."""
    shapes = [model.weights.shape(name) for name in model.weights]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)

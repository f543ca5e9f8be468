"""Recorded self-generated text with top-k predictions, used to warm-start learning drafters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.cache_dir import cache_folder
from paceline.core import Floats, Tokens
from paceline.errors import MethodError, ModelError
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import Pending, write_safetensors
from paceline.models.model import Model


@dataclass(frozen=True, eq=False)
class Trace:
    """Some texts of a model, and its likeliest successors at every token.

    Attributes:
        tokens: int32 [T], one text behind the other.
        starts: int32 [R], where each text begins; the first at 0.
        top_tokens: int32 [T, K], best first.
        top_probs: float32 [T, K], at temperature 1.
    """

    tokens: Tokens
    starts: Tokens
    top_tokens: Tokens
    top_probs: Floats

    def __post_init__(self) -> None:
        shapes = {len(self.tokens), len(self.top_tokens), len(self.top_probs)}
        rising = len(self.starts) and self.starts[0] == 0 and (np.diff(self.starts) > 0).all()
        inside = len(self.starts) and self.starts[-1] < len(self.tokens)
        if len(shapes) != 1 or self.top_tokens.shape != self.top_probs.shape:
            raise MethodError("a trace needs one row of successors for each token")
        if not rising or not inside:
            raise MethodError("the texts of a trace must begin at 0 and rise")

    def __len__(self) -> int:
        return len(self.tokens)

    def texts(self) -> Iterator[slice]:
        """Where each text lies."""
        ends = [*self.starts[1:].tolist(), len(self.tokens)]
        return map(slice, self.starts.tolist(), ends)


_TYPES: dict[str, tuple[str, Any]] = {
    "tokens": ("I32", np.int32),
    "starts": ("I32", np.int32),
    "top_tokens": ("I32", np.int32),
    "top_probs": ("F32", np.float32),
}


def trace_path(model: Model) -> Path:
    """Where a model's trace is kept: in the user's cache folder, by the model's fingerprint."""
    return cache_folder() / f"trace-{model.fingerprint()}.safetensors"


def known_trace(model: Model, vocab_size: int) -> Trace | None:
    """The trace that `paceline warm` made of a model, if it did.

    Raises:
        ModelError: the file is damaged.
    """
    path = trace_path(model)
    return read_trace(path, vocab_size) if path.is_file() else None


def write_trace(path: Path, trace: Trace) -> None:
    """Keep a trace.

    Raises:
        ModelError: the file cannot be written.
    """

    def pending(name: str) -> Pending:
        array: NDArray[Any] = getattr(trace, name)
        return Pending(array.shape, lambda: array, _TYPES[name][0])

    write_safetensors(path, {name: pending(name) for name in _TYPES})


def read_trace(path: Path, vocab_size: int) -> Trace:
    """Read a trace back.

    Raises:
        ModelError: the file is damaged, or of another model.
    """
    arrays = {name: stored.values for name, stored in read_file(path).items()}
    wrong = ModelError(f"{path} is no trace of this model; delete it, or run `paceline warm` again")
    for name, (_, dtype) in _TYPES.items():
        rank = 2 if name.startswith("top") else 1
        if name not in arrays or arrays[name].dtype != dtype or arrays[name].ndim != rank:
            raise wrong
    for name in ("tokens", "top_tokens"):
        array = arrays[name]
        if not array.size or array.min() < 0 or array.max() >= vocab_size:
            raise wrong
    probs = arrays["top_probs"]
    if not (np.isfinite(probs) & (probs >= 0) & (probs <= 1)).all():
        raise wrong
    try:
        return Trace(**{name: arrays[name] for name in _TYPES})
    except MethodError:
        raise wrong from None

"""Reads heads that others trained and published: Medusa's, as text-generation-inference keeps them.

A folder has `config.json` with `medusa_num_heads` and `medusa_num_layers`, and
`medusa_lm_head.safetensors` with `I.J.linear.weight` and `.bias` of block J of head I, and
`I.L.weight`, the head's own output matrix behind L blocks; a prefix `medusa_head.` is understood.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.core import Floats
from paceline.drafters.heads.base import HeadTarget, LoadedHead
from paceline.errors import ModelError
from paceline.models.fields import read_json
from paceline.models.formats.safetensors import Stored, read_file

if TYPE_CHECKING:
    from paceline.drafters.heads.medusa import Medusa

CONFIG, TENSORS, PICKLED = "config.json", "medusa_lm_head.safetensors", "medusa_lm_head.pt"
_PREFIX = "medusa_head."


def is_published(folder: Path) -> bool:
    """Return whether a folder holds a head of Medusa's own format."""
    return any((folder / name).is_file() for name in (TENSORS, PICKLED))


def read_published(folder: Path, target: HeadTarget) -> LoadedHead:
    """Read a published head for `target`.

    Raises:
        ModelError: the folder holds pickled tensors only, a damaged head, or one for a model of
            another shape.
    """
    import torch

    if not (folder / TENSORS).is_file():
        raise ModelError(
            f"{folder} holds only pickled tensors ({PICKLED}), which can run code when they are "
            f"read; load them with torch where you trust them and save them as {TENSORS}"
        )
    head = _settings(folder)
    stored = {
        name.removeprefix(_PREFIX): tensor for name, tensor in read_file(folder / TENSORS).items()
    }
    parameters = {}
    for name, shape in head.shapes(target).items():
        tensor = stored.get(_published_name(name, head.layers))
        if tensor is None or tensor.shape != shape:
            state = "is missing" if tensor is None else f"has the shape {list(tensor.shape)}"
            raise ModelError(
                f"{_published_name(name, head.layers)} {state} in {folder / TENSORS}, expected "
                f"{list(shape)}; take the heads that were trained for this model"
            )
        values = _floats(tensor)
        if not np.isfinite(values).all():
            raise ModelError(f"{folder / TENSORS} holds values that are not finite; get it anew")
        parameters[name] = torch.from_numpy(values)
    return LoadedHead(head, parameters, np.empty(0, np.int32))


def _settings(folder: Path) -> Medusa:
    from paceline.drafters.heads.medusa import Medusa

    config: dict[str, Any] = read_json(folder / CONFIG)
    given = [config.get("medusa_num_heads"), config.get("medusa_num_layers")]
    valid = [each for each in given if isinstance(each, int) and 1 <= each <= 64]
    if len(valid) < 2 or bool in map(type, given):
        raise ModelError(
            f"{folder / CONFIG} has medusa_num_heads {given[0]!r:.40} and medusa_num_layers "
            f"{given[1]!r:.40}, expected whole numbers from 1 to 64"
        )
    return Medusa(depth=valid[0], layers=valid[1], output="own")


def _published_name(name: str, layers: int) -> str:
    """Return what Medusa's files call one of our tensors: heads and blocks count from 0 there."""
    depth, *block, kind = name.split(".")
    head = int(depth) - 1
    if kind == "output":
        return f"{head}.{layers}.weight"
    return f"{head}.{int(block[0]) - 1 if block else 0}.linear.{kind}"


def _floats(tensor: Stored) -> Floats:
    if tensor.dtype == "BF16":
        return (tensor.values.astype(np.uint32) << 16).view(np.float32)
    return np.array(tensor.values, np.float32)

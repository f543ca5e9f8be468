"""The work of an interrupted compression: finished blocks, and what goes into the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from paceline.errors import ModelError, RequestError
from paceline.models.formats.packed import Packed
from paceline.models.formats.safetensors import Stored, read_file
from paceline.models.formats.stored_forms import StoredForms, arrays_of
from paceline.models.formats.writer import write_arrays, write_json
from paceline.models.tensors import Dense, Linear

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.pipeline import CompressedBlock

_STATE = "job.json"
_EXTRA = "extra-bits.json"
_TUNED = "tuned.json"
Arrays = dict[str, tuple[str, NDArray[Any]]]


class WorkFolder:
    """A folder beside the target that holds finished blocks until all are there.

    A block counts once its file has its name; the hidden states after it are written before, so
    that a kill at any moment loses at most the block that was running. As a context manager it
    leaves no folder behind when an error comes before there is anything to keep.

    Args:
        path: of the folder; made where it does not exist.
        job: what is done, in JSON: model, recipe, calibration, version.

    Raises:
        RequestError: another job was interrupted there.
        ModelError: it cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        state = path / _STATE
        if state.is_file() and self._holds_work():
            _check_same(path, state, job)
        else:
            write_json(state, dict(job))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None and not self._holds_work():
            self.remove()

    def _holds_work(self) -> bool:
        """Return whether there is more than the description of the job."""
        return self.path.is_dir() and any(each.name != _STATE for each in self.path.iterdir())

    def finished(self, layers: int) -> int:
        """Return how many blocks, from the first on, are there already."""
        done = 0
        while done < layers and self.block_file(done).is_file():
            done += 1
        while done and not self._hidden(done).is_file():
            done -= 1  # its outputs are gone: compress it again
        return done

    def block_file(self, index: int) -> Path:
        """Return where a block is kept."""
        return self.path / f"block-{index:04}.safetensors"

    def final_file(self, index: int) -> Path:
        """Return where a block is as it will be written: trained with the others, where it was."""
        return self._tuned(index) if self.is_tuned() else self.block_file(index)

    def is_tuned(self) -> bool:
        """Return whether the blocks were trained together."""
        return (self.path / _TUNED).is_file()

    def keep_tuned(self, layers: Sequence[Mapping[str, Linear | Tensor]]) -> None:
        """Keep blocks that were trained together; they count once all are there.

        Raises:
            ModelError: the system refused, e.g. the disk is full.
        """
        for index, tensors in enumerate(layers):
            write_arrays(self._tuned(index), _arrays(index, tensors))
        write_json(self.path / _TUNED, {"layers": len(layers)})

    def block(self, index: int) -> dict[str, Linear | Tensor]:
        """Return the matrices and vectors of a finished block by their names in the layer."""
        import torch

        tensors = StoredForms().collect(self.path, read_file(self.block_file(index)))
        found: dict[str, Linear | Tensor] = {}
        for name, each in tensors.items():
            short = name.split(".", 2)[2]
            if isinstance(each, Packed):
                found[short] = each.read()
            elif isinstance(each, Stored) and each.dtype == "F32":
                found[short] = torch.from_numpy(np.array(each.values))
            else:
                assert isinstance(each, Stored)
                found[short] = Dense(np.array(each.values), each.dtype)
        return found

    def hidden(self, index: int) -> Tensor:
        """Return what goes into a block, float32 [B, T, hidden]."""
        import torch

        return torch.from_numpy(np.array(read_file(self._hidden(index))["x"].values))

    def save(self, block: CompressedBlock) -> None:
        """Keep a finished block.

        Raises:
            ModelError: the system refused, e.g. the disk is full.
        """
        outputs = block.outputs.numpy()
        write_arrays(self._hidden(block.index + 1), {"x": ("F32", outputs)})
        write_arrays(self.block_file(block.index), _arrays(block.index, block.tensors))
        with suppress(OSError):
            self._hidden(block.index).unlink(missing_ok=True)

    def keep_gradients(self, index: int, fisher: Mapping[str, Tensor]) -> None:
        """Keep the Fisher information of a block, in 16 bits a weight.

        Raises:
            ModelError: the system refused, e.g. the disk is full.
        """
        arrays: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, each in fisher.items():
            top = float(each.max())
            scaled = (each / top if top else each).sqrt()  # squares do not fit half precision
            arrays[name] = ("F16", scaled.numpy().astype(np.float16))
            arrays[f"{name}.top"] = ("F32", np.array([top], np.float32))
        write_arrays(self._gradients(index), arrays)

    def gradients(self, index: int, name: str) -> Tensor:
        """Return the Fisher information of a matrix, float32 [out, in]."""
        import torch

        arrays = read_file(self._gradients(index))
        roots = np.array(arrays[name].values, np.float32)
        return torch.from_numpy(roots * roots * arrays[f"{name}.top"].values[0])

    def keep_extra_bits(self, extra: Mapping[str, float]) -> None:
        """Keep by how many bits each matrix should exceed the mean; gradients are all there.

        Raises:
            ModelError: the system refused.
        """
        write_json(self.path / _EXTRA, dict(extra))

    def extra_bits(self) -> dict[str, float] | None:
        """Return what `keep_extra_bits` kept; None where gradients are still to be computed.

        Raises:
            ModelError: it cannot be read.
        """
        file = self.path / _EXTRA
        return _read(self.path, file) if file.is_file() else None

    def _gradients(self, index: int) -> Path:
        return self.path / f"gradients-{index:04}.safetensors"

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _tuned(self, index: int) -> Path:
        return self.path / f"tuned-{index:04}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:04}.safetensors"


def _arrays(index: int, tensors: Mapping[str, Linear | Tensor]) -> Arrays:
    """Return what is written of a block."""
    arrays: Arrays = {}
    for name, weight in tensors.items():
        stored = weight if isinstance(weight, Linear) else weight.numpy()
        arrays |= arrays_of(f"layers.{index}.{name}", stored)
    return arrays


def _read(path: Path, file: Path) -> dict[str, Any]:
    """Return the values of a JSON file in the folder `path`."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}; remove {path} to begin anew") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no settings by name; remove {path} to begin anew")
    return values


def _check_same(path: Path, state: Path, job: Mapping[str, Any]) -> None:
    before = _read(path, state)
    different = sorted(key for key in job if before.get(key) != json.loads(json.dumps(job[key])))
    if different:
        raise RequestError(
            f"{path} holds another compression that was interrupted ({', '.join(different)} "
            "differ); remove it to begin anew, or give the same options to go on"
        )

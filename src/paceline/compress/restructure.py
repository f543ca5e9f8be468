"""Run the methods that change a whole model, and keep what they made beside unfinished work."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paceline.compress.base import MATRICES
from paceline.compress.structure.base import Structure, StructureMethod, kept_tensors
from paceline.compress.whole_model import WholeModel
from paceline.errors import ModelError
from paceline.models.config import LayerConfig
from paceline.models.formats.safetensors import read_file
from paceline.models.formats.writer import write_arrays, write_json

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = ("heads", "kv_heads", "intermediate", "window", "sinks")
_TERM, _SIDES = ":", ("left", "right")  # names of the factors of a shared matrix's term


@dataclass(frozen=True)
class SharedLayer:
    """A layer that has the matrices of another one.

    Attributes:
        source: index of the other one, which comes before.
        terms: float32 [out, rank] and [rank, in], products that are added to matrices, by name.
    """

    source: int
    terms: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Restructured:
    """A model some of whose parts were left out, or trained.

    Attributes:
        model: that is left, with the texts.
        kept: for each of its layers, the index in the model that is compressed, and its shape.
        biases: matrices that got a bias.
        notes: sentences for the card.
        shared: layers that have the matrices of others.
    """

    model: WholeModel
    kept: tuple[tuple[int, LayerConfig], ...]
    biases: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    shared: Mapping[int, SharedLayer] = field(default_factory=dict)

    @classmethod
    def whole(cls, model: WholeModel) -> Restructured:
        """Return a model nothing of which is changed yet."""
        return cls(model, tuple(enumerate(model.config.layers)))

    def after(
        self, method: StructureMethod, base: WholeModel, folder: Path, step: int
    ) -> Restructured:
        """Return the model after a method, which runs unless an earlier run has finished it.

        Args:
            method: that changes the model.
            base: the model that is compressed, as it was.
            folder: where finished work is kept.
            step: place of the method among those of the recipe.
        """
        done = folder / f"structure-{step}.json"
        if not done.is_file():
            made = method.restructure(self.model, base, folder / f"structure-{step}")
            _keep(folder, step, made, done)
        return self._read(method, folder, step, done)

    def _read(self, method: StructureMethod, folder: Path, step: int, done: Path) -> Restructured:
        try:
            state = json.loads(done.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {done}: {error}; remove it to go on") from None
        layers = self.model.config.layers
        kept = [
            (int(entry["source"]), replace(layers[entry["source"]], **_sizes(entry)))
            for entry in state["layers"]
        ]
        biases = self.biases | method.added_biases
        files = [_file(folder, step, place) for place in range(len(kept))]
        hidden, tied = state.get("outer") or (None, None)
        config = replace(self.model.config, layers=tuple(shape for _, shape in kept))
        outer = self.model.outer
        if hidden is not None:
            config = replace(config, hidden_size=int(hidden), tied=bool(tied))
            outer = dict(outer) | _outer(folder, step)
        shared = {
            place: SharedLayer(int(entry["shares"]), _terms(files[place]))
            for place, entry in enumerate(state["layers"])
            if entry.get("shares") is not None
        }
        layer = _reader(self.model.layer, kept, files, biases, config.hidden_size)
        if shared:
            layer = partial(_shared, layer, shared)
        return Restructured(
            replace(self.model, config=config, layer=layer, outer=outer),
            tuple((self.kept[source][0], shape) for source, shape in kept),
            biases,
            (*self.notes, str(state["note"])),
            shared,
        )


def _sizes(entry: Mapping[str, int | None]) -> dict[str, int | None]:
    return {name: entry[name] for name in _SIZES}


def _file(folder: Path, step: int, place: int) -> Path:
    return folder / f"structure-{step}-{place:04}.safetensors"


def _keep(folder: Path, step: int, made: Structure, done: Path) -> None:
    """Keep what a method made; it counts once `done` is there."""
    entries: list[dict[str, int | None]] = []
    for place, layer in enumerate(made.layers):
        sizes = {name: getattr(layer.shape, name) for name in _SIZES}
        entries.append({"source": layer.source, **sizes, "shares": layer.shares})
        factors = {
            f"{name}{_TERM}{side}": ("F32", each.contiguous().numpy())
            for name, pair in layer.terms.items()
            for side, each in zip(_SIDES, pair, strict=True)
        }
        arrays = factors | {
            name: ("F32", each.contiguous().numpy()) for name, each in layer.tensors.items()
        }
        write_arrays(_file(folder, step, place), arrays)
    state: dict[str, object] = {"layers": entries, "note": made.note}
    if made.config is not None:
        arrays = {name: ("F32", each.contiguous().numpy()) for name, each in made.outer.items()}
        write_arrays(_outer_file(folder, step), arrays)
        state["outer"] = [made.config.hidden_size, made.config.tied]
    write_json(done, state)


def _outer_file(folder: Path, step: int) -> Path:
    return folder / f"structure-{step}-outer.safetensors"


def _outer(folder: Path, step: int) -> dict[str, Tensor]:
    """Return the tensors outside the layers that a method made."""
    import torch

    return {
        name: torch.from_numpy(np.array(each.values))
        for name, each in read_file(_outer_file(folder, step)).items()
    }


def _reader(
    before: Callable[[int], Mapping[str, Tensor]],
    kept: Sequence[tuple[int, LayerConfig]],
    files: Sequence[Path],
    biases: frozenset[str],
    hidden: int,
) -> Callable[[int], Mapping[str, Tensor]]:
    """Return what reads a layer: its tensors before, with those that are new in their place."""

    def read(index: int) -> Mapping[str, Tensor]:
        import torch

        source, shape = kept[index]
        tensors = dict(before(source))
        for name, each in read_file(files[index]).items():
            if _TERM in name:
                continue
            tensors[name] = torch.from_numpy(np.array(each.values))
        for name in biases:
            tensors.setdefault(f"{name}.bias", torch.zeros(hidden))
        return kept_tensors(tensors, shape)

    return read


def _terms(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the products that a file has for shared matrices."""
    import torch

    arrays = read_file(file)
    names = {name.partition(_TERM)[0] for name in arrays if _TERM in name}

    def factor(name: str, side: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[f"{name}{_TERM}{side}"].values))

    return {name: (factor(name, _SIDES[0]), factor(name, _SIDES[1])) for name in sorted(names)}


def _shared(
    layer: Callable[[int], Mapping[str, Tensor]], shared: Mapping[int, SharedLayer], index: int
) -> Mapping[str, Tensor]:
    """Return a layer; of one that shares matrices these, with what is added to them."""
    if index not in shared:
        return layer(index)
    own, theirs = shared[index], layer(shared[index].source)
    tensors = dict(layer(index))
    for name in tensors.keys() & set(MATRICES):
        tensors[name] = theirs[name]
    for name, (left, right) in own.terms.items():
        tensors[name] = tensors[name] + left @ right
    return tensors

"""DAREx: drop most of what tuning changed, and rescale the rest by a factor that is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.compress.base import GROUPS, MATRICES, Statistic, Statistics
from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.whole_model import WholeModel, divergence, run_frozen
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

FACTORS = ("search", "layers", "dare")
CHOICES = ("random", "largest")
_LEAST, _MOST = 0.7, 1.1  # of the factors that are tried: times 1, and times that of DARE
_TRIED = 8  # factors from the least to the most, before the best of them is refined
_STEPS = (0.8, 1.25)  # by which the factor of each layer is moved

Layer = Mapping[str, "Tensor"]


@structures.register("darex", Exactness.LOSSY)
@dataclass(frozen=True)
class Darex(StructureMethod):
    """Drop changes of a tuned model against its base at random, and rescale those that are left.

    A change is what a weight of a layer's matrices differs by. All changes that are left are
    multiplied by one factor, which is searched for on texts without labels: the one with which the
    divergence from the tuned model is least. `factor=layers` then moves that of each layer;
    `factor=dare` takes 1 / (1 - drop), as plain DARE does. Last in a recipe, only what differs from
    the base is written, and the checkpoint is read together with the base; compressed further, or
    where the base is stored in few bits, it is written whole.

    Attributes:
        base: checkpoint that the model was tuned from, a folder or a file; empty, the default, for
            the model as it was before the methods in front, e.g. `temp_lora+darex`.
        drop: share of the changes that is dropped, 0 to 0.999. Default 0.9.
        factor: search, layers or dare. Default search.
        choose: random, or largest: of each row the changes stay that are largest times the norm of
            their input, for changes that are too large to drop at random. Default random.
        rows: texts of calibration that factors are judged by, 1 to 1000. Default 4.
        seed: of what is dropped, 0 to 2^31. Default 0.
    """

    base: str = ""
    drop: float = 0.9
    factor: str = "search"
    choose: str = "random"
    rows: int = 4
    seed: int = 0

    source = Source(
        authors="Deng et al.",
        title="DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models",
        arxiv="2410.09344",
        section="section 4",
        note="factors are searched on the model's distributions, of all layers or of each",
    )
    catalogue = (437,)
    missing = {437: "DAREx-L2, a penalty on changes while the model is tuned"}
    examples = ("darex:base=../tuned-from,drop=0.5", "darex:base=../tuned-from,factor=layers")

    def __post_init__(self) -> None:
        check_range(0.0, 0.999, self.name, drop=self.drop)
        check_range(1, 1000, self.name, rows=self.rows)
        check_range(0, 2**31, self.name, seed=self.seed)
        for key, value, known in (
            ("factor", self.factor, FACTORS),
            ("choose", self.choose, CHOICES),
        ):
            if value not in known:
                raise MethodError(f"{self.name}:{key} is {value!r}, expected {', '.join(known)}")
        if self.choose == "largest" and self.factor == "dare":
            raise MethodError(
                f"{self.name}:factor=dare counts on changes that are dropped at random, and "
                "choose=largest does not; take factor=search"
            )

    @property
    def changes_of(self) -> str | None:
        """See `StructureMethod`."""
        return self.base

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: the base has other shapes, or no matrix differs from it.
        """
        old = _opened(self.base, model) if self.base else base
        self._check_count(model, old)
        x = model.embed(model.texts)
        kept: list[dict[str, Tensor]] = []
        for index in range(len(model.config.layers)):
            tuned, before = model.layer(index), old.layer(index)
            self._check_shapes(index, tuned, before)
            norms: dict[str, Tensor] = {}
            if self.choose == "largest":
                x, norms = _input_norms(model, index, x)
            changes = {name: tuned[name] - before[name] for name in MATRICES if name in tuned}
            kept.append(self._kept(index, changes, norms))
        if not any(kept):
            raise MethodError(
                f"{self.name}: no matrix differs from {self.base or 'the model before'}; name the "
                "checkpoint that the model was tuned from with base=PATH, or tune before, e.g. "
                "temp_lora+darex"
            )
        changed = _Changed(model, old, kept, self.rows)
        factors = self._factors(changed)
        words = " to ".join(f"{each:.2f}" for each in sorted({min(factors), max(factors)}))
        note = (
            f"{self.name} dropped {self.drop:.1%} of the changes and multiplied the others by "
            f"{words}: the result is {changed.error(factors):.4f} nats a token from the tuned "
            f"model. {self._other(changed)} the model before is "
            f"{changed.error([0.0] * len(kept)):.4f}."
        )
        layers = enumerate(model.config.layers)
        return Structure(
            [KeptLayer(at, shape, changed.made(at, factors[at])) for at, shape in layers], note
        )

    def _other(self, changed: _Changed) -> str:
        """Return what the factor would bring that is not searched for."""
        name, factor = "that of DARE", 1 / (1 - self.drop)
        if self.choose == "largest":
            name, factor = "a factor of 1", 1.0
        error = changed.error([factor] * len(changed.kept))
        return f"With {name} it would be {error:.4f}, and"

    def _factors(self, changed: _Changed) -> list[float]:
        """Return what the changes of each layer are multiplied by."""
        count, most = len(changed.kept), 1 / (1 - self.drop)
        if self.factor == "dare":
            return [most] * count
        ratio = (_MOST * most / _LEAST) ** (1 / (_TRIED - 1))
        errors = {}
        for step in range(_TRIED):
            factor = _LEAST * ratio**step
            errors[factor] = changed.error([factor] * count)
        for power in (0.5, 0.25):  # between the best and its neighbours
            best = min(errors, key=errors.__getitem__)
            for factor in (best * ratio**power, best / ratio**power):
                errors[factor] = changed.error([factor] * count)
        best = min(errors, key=errors.__getitem__)
        factors = [best] * count
        return changed.by_layer(factors, errors[best]) if self.factor == "layers" else factors

    def _check_count(self, model: WholeModel, old: WholeModel) -> None:
        """Refuse a base of another depth."""
        if len(old.config.layers) != len(model.config.layers):
            raise MethodError(
                f"{self.name}: {self.base or 'the model before'} has {len(old.config.layers)} "
                f"layers and this one {len(model.config.layers)}; take the checkpoint that it was "
                "tuned from"
            )

    def _check_shapes(self, index: int, tuned: Layer, old: Layer) -> None:
        """Refuse a base that is none."""
        shapes = [{name: tuple(each.shape) for name, each in one.items()} for one in (tuned, old)]
        if shapes[0] != shapes[1]:
            raise MethodError(
                f"{self.name}: layer {index} has other tensors than that of "
                f"{self.base or 'the model before'}; take the checkpoint that it was tuned from"
            )

    def _kept(
        self, index: int, changes: Mapping[str, Tensor], norms: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the changes of a layer's matrices with zeros for those that are dropped."""
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        kept = {}
        for name, each in changes.items():
            if not bool(each.any()):
                continue
            if self.choose == "random":
                draws = torch.rand(each.shape, generator=generator, dtype=torch.float64)
                kept[name] = each * (draws >= self.drop)
            else:
                count = max(1, round((1 - self.drop) * each.shape[1]))
                places = (each.abs() * norms[name]).topk(count, dim=1).indices
                kept[name] = torch.zeros_like(each).scatter(1, places, each.gather(1, places))
        return kept


class _Changed:
    """A base with some changes of a tuned model, multiplied by factors.

    Args:
        model: the tuned one.
        old: its base.
        kept: the changes that are left of each layer.
        rows: texts that errors are measured on.
    """

    def __init__(
        self, model: WholeModel, old: WholeModel, kept: list[dict[str, Tensor]], rows: int
    ) -> None:
        self.kept = kept
        self._model = replace(model, texts=model.texts[:rows]).in_memory
        self._old = old.in_memory
        self._start = self._model.embed(self._model.texts)
        x = self._start
        for index in range(len(kept)):
            x = self._model.run(index, x)
        self._right = x

    def made(self, index: int, factor: float) -> dict[str, Tensor]:
        """Return the matrices of a layer that have changes."""
        before = self._old.layer(index)
        return {name: _sum(before[name], factor * each) for name, each in self.kept[index].items()}

    def error(self, factors: Sequence[float]) -> float:
        """Return the divergence from the tuned model, in nats a token."""
        return self._rest(self._start, 0, factors)

    def by_layer(self, factors: Sequence[float], error: float) -> list[float]:
        """Return factors of which each was moved where that makes the error smaller."""
        found, x = list(factors), self._start
        for index in range(len(found)):
            before = found[index]
            for step in _STEPS:
                tried = [*found[:index], before * step, *found[index + 1 :]]
                new = self._rest(x, index, tried)
                if new < error:
                    found, error = tried, new
            x = self._run(index, x, found[index])
        return found

    def _rest(self, x: Tensor, first: int, factors: Sequence[float]) -> float:
        for index in range(first, len(self.kept)):
            x = self._run(index, x, factors[index])
        return divergence(self._model, self._right, x)

    def _run(self, index: int, x: Tensor, factor: float) -> Tensor:
        config = self._model.config
        weights = {**self._model.layer(index), **self.made(index, factor)}
        return run_frozen(config, config.layers[index], weights, x)


def _opened(path: str, model: WholeModel) -> WholeModel:
    """Return a checkpoint with the texts, and what lies outside the layers, of a model."""
    import torch

    from paceline.models import load

    base = load(path)

    def read(index: int) -> Layer:
        prefix = f"layers.{index}."
        return {
            name.removeprefix(prefix): torch.from_numpy(base.weights.dense(name).copy())
            for name in base.weights
            if name.startswith(prefix)
        }

    return replace(model, config=base.config, layer=read)


def _input_norms(model: WholeModel, index: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs of a layer, and the norms of the inputs of its matrices."""
    weights = model.layer(index)
    groups = [[name for name in group if name in weights] for group in GROUPS]
    seen = {group[0]: Statistics() for group in groups if group}

    def tap(name: str, inputs: Tensor) -> None:
        if name in seen:
            seen[name] = seen[name].plus(inputs, frozenset({Statistic.INPUT_NORM}))

    outputs = model.run(index, x, tap)
    found = {}
    for group in groups:
        for name in group:
            norm = seen[group[0]].input_norm
            assert norm is not None, f"{name} multiplied nothing"
            found[name] = norm
    return outputs, found


def _sum(old: Tensor, change: Tensor) -> Tensor:
    """Return changed weights, rounded to the type that holds the old ones; others as they were."""
    import torch

    from paceline.models.tensors import narrowest

    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    kind = types[narrowest(old.numpy()).dtype]
    return torch.where(change == 0, old, (old + change).to(kind).float())

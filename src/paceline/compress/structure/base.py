"""The contract of methods that leave parts of a model out, and what removes layers one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import Compressor
from paceline.compress.whole_model import WholeModel, divergence, run_frozen
from paceline.errors import MethodError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.tensor_names import has_part
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

CHOICES = ("cosine", "loss", "last")
_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class KeptLayer:
    """One layer of what is left of a model.

    Attributes:
        source: index of the layer in the model before.
        shape: of the layer now.
        tensors: float32 tensors that are new, by their names in the layer; others stay as they
            were, and those of missing parts go.
        shares: place of an earlier layer among those that are left whose matrices it has, and that
            has matrices of its own; None where this one has.
        terms: products of low rank that are added to shared matrices, as float32 [out, rank] and
            [rank, in] by the names of the matrices.
    """

    source: int
    shape: LayerConfig
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shares: int | None = None
    terms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """What a method made of a model.

    Attributes:
        layers: that are left, in order.
        note: what the card tells, one sentence.
        outer: float32 tensors outside the layers that are new, by name.
        config: of the model, where more than its layers changes: hidden size, a head of its own.
    """

    layers: Sequence[KeptLayer]
    note: str
    outer: Mapping[str, Tensor] = field(default_factory=dict)
    config: ModelConfig | None = None


@dataclass(frozen=True)
class StructureMethod(Compressor, ABC):
    """A method that changes a whole model of floating-point numbers before it is compressed.

    Several may follow one another in a recipe; each sees what the one before it left.

    Attributes:
        whole_layers: it leaves whole layers out and changes nothing else of the model's shape, so
            that formats with one shape for all layers can hold the result.
        added_biases: matrices that get a bias in all layers.
        changes_hidden: it may change the hidden size, and untie embedding and head.
        shares_layers: layers may share matrices, so that nothing may follow that changes those of
            one layer alone.
    """

    whole_layers: ClassVar[bool] = False
    added_biases: ClassVar[frozenset[str]] = frozenset()
    changes_hidden: ClassVar[bool] = False
    shares_layers: ClassVar[bool] = False

    @property
    def changes_of(self) -> str | None:
        """Checkpoint that most weights are of, so that only others are written; None for no such.

        Empty text is the model that is compressed.
        """
        return None

    @abstractmethod
    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """Return what becomes of a model.

        Args:
            model: as the methods before left it.
            base: the model that is compressed, as it was.
            folder: where long work keeps what it has, to go on after an interruption.

        Raises:
            MethodError: the settings do not fit the model.
        """


@dataclass(frozen=True)
class PartRemover(StructureMethod):
    """Removes one part after another, all of a kind.

    With `by=cosine` the parts go whose inputs and outputs, both with the residual stream, have the
    largest cosine similarity, mean over positions of calibration. With `by=loss` each removal is
    the one that costs least: among the `candidates` parts of the largest similarity that are left,
    the one whose removal makes the smallest divergence from the model as it was. `by=last` takes
    the last ones, for comparison.

    Attributes:
        count: parts to remove, 1 to 1000. Default 3.
        by: what chooses: cosine, loss or last. Default loss.
        candidates: parts that are tried for each removal by loss, 2 to 1000. Default 8.
        rows: texts of calibration that removals are judged by, 1 to 1000. Default 4.
    """

    count: int = 3
    by: str = "loss"
    candidates: int = 8
    rows: int = 4

    parts: ClassVar[str] = "parts"  # what is removed, for messages

    def __post_init__(self) -> None:
        check_range(1, 1000, self.name, count=self.count, rows=self.rows)
        check_range(2, 1000, self.name, candidates=self.candidates)
        if self.by not in CHOICES:
            raise MethodError(f"{self.name}:by is {self.by!r}, expected {', '.join(CHOICES)}")

    @abstractmethod
    def removable(self, shape: LayerConfig) -> bool:
        """Return whether a layer has such a part."""

    @abstractmethod
    def without(self, shape: LayerConfig) -> LayerConfig | None:
        """Return a layer's shape without the part; None where nothing of the layer is left."""

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        shapes = model.config.layers
        there = [index for index, shape in enumerate(shapes) if self.removable(shape)]
        if self.count >= len(there):
            raise MethodError(
                f"{self.name}:count is {self.count}, expected fewer than the {len(there)} "
                f"{self.parts} of this model"
            )
        if self.by == "last":
            chosen = there[-self.count :]
        else:
            similar = _similarities(self, model, there)
            order = sorted(there, key=lambda index: -similar[index])
            chosen = order[: self.count] if self.by == "cosine" else _cheapest(self, model, order)
        left = _left(self, shapes, set(chosen))
        self._check_attention([shape for _, shape in left])
        removed = ", ".join(map(str, sorted(chosen)))
        note = f"{self.name} removed the {self.parts} {removed} of {len(shapes)} layers."
        return Structure([KeptLayer(index, shape) for index, shape in left], note)

    def _check_attention(self, shapes: Sequence[LayerConfig]) -> None:
        if not any(shape.heads for shape in shapes):
            raise MethodError(
                f"{self.name}:count {self.count} would leave no layer with attention; remove fewer"
            )


def _left(
    remover: PartRemover, shapes: Sequence[LayerConfig], chosen: set[int]
) -> list[tuple[int, LayerConfig]]:
    """Return the layers that are left, with their indices."""
    both = ((i, remover.without(each) if i in chosen else each) for i, each in enumerate(shapes))
    return [(index, shape) for index, shape in both if shape is not None]


def _similarities(
    remover: PartRemover, model: WholeModel, there: Sequence[int]
) -> dict[int, float]:
    """Return the cosine similarity of the inputs and outputs of each part, mean over positions."""
    from torch.nn import functional as F

    found = {}
    x = model.embed(model.texts)
    for index, shape in enumerate(model.config.layers):
        after = model.run(index, x)
        if index in there:
            rest = remover.without(shape)
            whole = after
            if rest is not None:  # the layer with the part and without its other parts
                whole = run_frozen(model.config, _only(shape, rest), model.layer(index), x)
            found[index] = float(F.cosine_similarity(x, whole, dim=-1).mean())
        x = after
    return found


def _only(shape: LayerConfig, rest: LayerConfig) -> LayerConfig:
    """Return the part of a layer that is not in the rest of it."""
    if rest.heads:
        return replace(shape, heads=0, kv_heads=0)
    return replace(shape, intermediate=0)


def _cheapest(remover: PartRemover, model: WholeModel, order: Sequence[int]) -> list[int]:
    """Remove the parts one by one whose removal costs least; see `PartRemover`."""
    model = replace(model, texts=model.texts[: remover.rows]).in_memory
    shapes: list[LayerConfig | None] = list(model.config.layers)
    states = layer_states(model, shapes, 0, model.embed(model.texts))
    right, chosen = states[-1], list[int]()

    def without(index: int) -> list[LayerConfig | None]:
        left = remover.without(model.config.layers[index])
        return [*shapes[:index], left, *shapes[index + 1 :]]

    def cost(index: int) -> float:
        return divergence(
            model, right, layer_states(model, without(index), index, states[index])[-1]
        )

    for _ in range(remover.count):
        tried = [index for index in order if index not in chosen][: remover.candidates]
        cheapest = min(tried, key=cost)
        chosen.append(cheapest)
        shapes = without(cheapest)
        states[cheapest:] = layer_states(model, shapes, cheapest, states[cheapest])
    return chosen


def layer_states(
    model: WholeModel, shapes: Sequence[LayerConfig | None], first: int, x: Tensor
) -> list[Tensor]:
    """Return what goes into each layer from `first` on, and what comes out of the last one.

    Args:
        model: whose tensors the layers have.
        shapes: of all layers; one that is None is skipped.
        first: layer to begin with.
        x: what goes into it.
    """
    states = [x]
    for index, shape in enumerate(shapes[first:], first):
        if shape is not None:
            x = run_frozen(model.config, shape, model.layer(index), x)
        states.append(x)
    return states


def kept_tensors(tensors: Mapping[str, Tensor], shape: LayerConfig) -> dict[str, Tensor]:
    """Return the tensors of the parts that a layer has."""
    return {name: each for name, each in tensors.items() if has_part(shape, name)}


@dataclass(frozen=True)
class Distilled(StructureMethod, ABC):
    """A method that trains layers on the divergence from the original, and removes none.

    Attributes:
        tokens: that are trained on, 1 to 10^9; texts come again where there are fewer. Default
            32000.
        parameters: what is trained, a key of `rates`. Default lora.
        rank: of products of low rank, 1 to 1024. Default 32.
        rate: of Adam at the beginning, 0 to 1; it falls to zero by a cosine. 0, the default, takes
            that of `rates`.
        batch: texts of a step, 1 to 1024. Default 2.
        dtype: of the products in blocks, fp32 or bf16. Default fp32.
        rates: the usual rate of each choice of parameters.
    """

    tokens: int = 32_000
    parameters: str = "lora"
    rank: int = 32
    rate: float = 0.0
    batch: int = 2
    dtype: str = "fp32"

    rates: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self) -> None:
        check_range(1, 10**9, self.name, tokens=self.tokens)
        check_range(1, 1024, self.name, rank=self.rank, batch=self.batch)
        check_range(0, 1, self.name, rate=self.rate)
        if self.dtype not in _DTYPES:
            raise MethodError(f"{self.name}:dtype is {self.dtype!r}, expected fp32 or bf16")
        if self.parameters not in self.rates:
            raise MethodError(
                f"{self.name}:parameters is {self.parameters!r}, expected {', '.join(self.rates)}"
            )

    @property
    def half(self) -> bool:
        """Return whether blocks multiply in bfloat16."""
        return self.dtype == "bf16"

    def trained_layers(self, before: Sequence[Mapping[str, Tensor]]) -> list[TrainedLayer]:
        """Return the layers with what is trained, from their float32 tensors."""
        import torch

        from paceline.compress.reconstruct.recovery import TrainedLayer

        generator = torch.Generator().manual_seed(0)
        return [TrainedLayer(each, self.parameters, self.rank, generator) for each in before]

    def train(self, recovery: Recovery, folder: Path) -> int:
        """Train, or go on where an interrupted training was; return the tokens."""
        size = min(self.batch, len(recovery.split.trained)) * recovery.student.texts.shape[1]
        steps = max(1, round(self.tokens / size))
        rate = self.rate or self.rates[self.parameters]
        recovery.train(steps, rate, folder / "training.safetensors")
        return steps * size


def trained_model(
    model: WholeModel, tuned: Sequence[Mapping[str, Tensor]], better: bool
) -> list[KeptLayer]:
    """Return all layers of a model, with what training made of them if that is better."""
    return [
        KeptLayer(index, shape, tuned[index] if better else {})
        for index, shape in enumerate(model.config.layers)
    ]

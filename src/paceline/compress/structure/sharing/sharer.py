"""Choose layers that get the matrices of earlier ones, and train what is left."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.base import MATRICES
from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.structure.sharing.borrowing import BorrowingLayer, Terms
from paceline.compress.whole_model import WholeModel, divergence, run_frozen
from paceline.errors import MethodError
from paceline.registry import check_range

if TYPE_CHECKING:
    from torch import Tensor

_RANK = 32  # of the products that are trained and merged into matrices


@dataclass(frozen=True)
class Sharer(StructureMethod):
    """Gives some layers the matrices of the nearest layer before that keeps its own.

    Layers are chosen one by one: among the `candidates` whose outputs change least, the one with
    which the model diverges least from what it was. Then norms, and products of low rank that are
    merged into the matrices that are left, are trained towards the model as it was (`recover`).

    Attributes:
        count: layers that lose their matrices, 1 to 1000. Default 3.
        candidates: layers that are tried for each, 1 to 1000. Default 8.
        rows: texts of calibration that they are judged by, 1 to 1000. Default 4.
        tokens: that are trained on, 0 to 10^9; 0 trains nothing. Default 32000.
        rate: of Adam at the beginning, up to 1; it falls to zero by a cosine. Default 0.001.
        batch: texts of a step, 1 to 1024. Default 2.
    """

    count: int = 3
    candidates: int = 8
    rows: int = 4
    tokens: int = 32_000
    rate: float = 1e-3
    batch: int = 2

    shares_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(1, 1000, self.name, count=self.count, rows=self.rows)
        check_range(1, 1000, self.name, candidates=self.candidates)
        check_range(0, 10**9, self.name, tokens=self.tokens)
        check_range(1e-9, 1.0, self.name, rate=self.rate)
        check_range(1, 1024, self.name, batch=self.batch)

    @abstractmethod
    def terms(self, own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Terms:
        """Return products of low rank that are added to another layer's matrices.

        Args:
            own: float32 tensors of the layer that loses its matrices.
            theirs: those of the layer whose matrices it gets.
        """

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`.

        Raises:
            MethodError: too few layers have the shape of one before.
        """
        model = model.in_memory
        sources = self._sources(model)
        made = self._trained(model, base, sources, folder)
        pairs = ", ".join(f"{layer} from {source}" for layer, source in sorted(sources.items()))
        return replace(
            made, note=f"{self.name} shares the matrices of layers: {pairs}. {made.note}"
        )

    def _sources(self, model: WholeModel) -> dict[int, int]:
        """Return the layers that lose their matrices, each with the one whose it gets."""
        part = replace(model, texts=model.texts[: self.rows])
        x = part.embed(part.texts)
        states, nearness = [x], {}
        for index in range(len(model.config.layers)):
            after = part.run(index, x)
            if index and _fits(model, index, index - 1):
                other = self._run(part, index, {index: index - 1}, x)
                nearness[index] = float((after - other).square().sum() / (after - x).square().sum())
            x = after
            states.append(x)
        order = sorted(nearness, key=nearness.__getitem__)
        sources: dict[int, int] = {}
        for _ in range(self.count):
            taken = {*sources, *sources.values()}
            tried = [each for each in order if each not in taken]
            choices = [{**sources, each: _root(sources, each - 1)} for each in tried]
            if not choices:
                raise MethodError(
                    f"{self.name}:count is {self.count}, and only {len(sources)} layers of this "
                    "model can have the matrices of one before; give fewer"
                )
            sources = min(
                choices[: self.candidates], key=lambda each: self._cost(part, each, states)
            )
        return sources

    def _cost(self, model: WholeModel, sources: Mapping[int, int], states: list[Tensor]) -> float:
        """Return the divergence from the model as it was; `states` are its layers' inputs."""
        first = min(sources)
        x = states[first]
        for index in range(first, len(model.config.layers)):
            x = self._run(model, index, sources, x)
        return divergence(model, states[-1], x)

    def _run(self, model: WholeModel, index: int, sources: Mapping[int, int], x: Tensor) -> Tensor:
        weights = dict(model.layer(index))
        if index in sources:
            weights = self._borrowed(model, index, sources[index])
        return run_frozen(model.config, model.config.layers[index], weights, x)

    def _borrowed(self, model: WholeModel, index: int, source: int) -> dict[str, Tensor]:
        """Return the tensors of a layer with the matrices of another."""
        weights, theirs = dict(model.layer(index)), model.layer(source)
        terms = self.terms(model.layer(index), theirs)
        for name in weights.keys() & set(MATRICES):
            weights[name] = theirs[name]
            if name in terms:
                left, right = terms[name]
                weights[name] = theirs[name] + left @ right
        return weights

    def _trained(
        self, model: WholeModel, base: WholeModel, sources: Mapping[int, int], folder: Path
    ) -> Structure:
        """Return the layers, trained where that brings them nearer to the model as it was."""
        import torch

        from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer

        shapes = model.config.layers
        before = [dict(model.layer(index)) for index in range(len(shapes))]
        terms = {at: self.terms(before[at], before[source]) for at, source in sources.items()}
        untrained = [
            self._borrowed(model, at, sources[at]) if at in sources else before[at]
            for at in range(len(shapes))
        ]
        plain = [
            KeptLayer(at, shape, {}, sources.get(at), terms.get(at, {}))
            for at, shape in enumerate(shapes)
        ]
        if not self.tokens:
            return Structure(plain, "Nothing was trained.")
        generator = torch.Generator().manual_seed(0)
        owners = {
            at: TrainedLayer(before[at], "lora", _RANK, generator)
            for at in range(len(shapes))
            if at not in sources
        }
        borrowing = {
            at: BorrowingLayer(before[at], owners[source], terms[at])
            for at, source in sources.items()
        }
        layers = [owners.get(at) or borrowing[at] for at in range(len(shapes))]
        recovery = Recovery(model, base.in_memory, layers, self.batch)
        size = min(self.batch, len(recovery.split.trained)) * model.texts.shape[1]
        steps = max(1, round(self.tokens / size))
        old = recovery.error(untrained)
        recovery.train(steps, self.rate, folder / "training.safetensors")
        with torch.no_grad():
            new = recovery.error(recovery.trained_weights())
        words = f"went from {old:.4f} to {new:.4f} nats a token"
        if not new < old:
            words = f"stayed at {old:.4f} nats a token, and nothing of it is kept"
        note = f"Trained on {steps * size} tokens, the divergence on held-out texts {words}."
        if not new < old:
            return Structure(plain, note)
        kept = [
            KeptLayer(at, shape, owners[at].final())
            if at in owners
            else KeptLayer(at, shape, borrowing[at].vectors(), sources[at], borrowing[at].terms())
            for at, shape in enumerate(shapes)
        ]
        return Structure(kept, note)


def _fits(model: WholeModel, index: int, source: int) -> bool:
    """Return whether a layer's matrices have the shapes of another's."""
    one, other = (
        {name: each.shape for name, each in model.layer(at).items() if name in MATRICES}
        for at in (index, source)
    )
    return one == other


def _root(sources: Mapping[int, int], index: int) -> int:
    """Return the layer that a layer has its matrices from."""
    return sources.get(index, index)

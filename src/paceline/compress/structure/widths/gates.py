"""Gates on channels and heads that are trained to be open or shut: hard-concrete variables.

After "Learning Sparse Neural Networks through L0 Regularization" (Louizos et al. 2018), section
2.3: a gate is clamp(s * (HIGH - LOW) + LOW, 0, 1) with s = sigmoid((logit(u) + a) / TEMPERATURE),
u uniform and a trained, and it is not shut with probability sigmoid(a - TEMPERATURE log(-LOW /
HIGH)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.compress.reconstruct.recovery import TrainedLayer
    from paceline.models.blocks import LayerWeights, Matrix

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
_START = 2.0  # where the logits of gates begin, on average
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)


class Gates:
    """Gates of the units of one part of a layer.

    Args:
        scores: [units]; higher begins more open.
        size: weights of a unit.

    Attributes:
        logits: float32 [units], trained.
        size: as above.
    """

    def __init__(self, scores: Tensor, size: int) -> None:
        import torch

        self.logits, self.size = start_logits(scores).requires_grad_(), size
        self._noise = torch.full((len(scores),), 0.5)

    def draw(self, generator: object) -> None:
        """Draw the noise of one step."""
        import torch

        drawn = torch.rand(len(self._noise), generator=generator)  # type: ignore[call-overload]
        self._noise = drawn.clamp(1e-6, 1 - 1e-6)

    def values(self) -> Tensor:
        """Return how far each is open, 0 to 1, differentiable."""
        return gate_values(self.logits, self._noise)


class GatedLayer:
    """A layer with a gate on each MLP channel and each group of heads.

    Args:
        layer: whose weights are trained, or not.
        gates: of `down` (channels) and `o` (groups of heads).
        rate: of the gates, as a factor of that of the weights.

    Attributes:
        gates: as above.
    """

    def __init__(self, layer: TrainedLayer, gates: Mapping[str, Gates], rate: float) -> None:
        self._layer, self.gates, self._rate = layer, gates, rate

    def groups(self) -> list[tuple[Tensor, float]]:
        """Return the parameters with their factors of the rate."""
        return [
            *self._layer.groups(),
            *((each.logits, self._rate) for each in self.gates.values()),
        ]

    def weights(self) -> LayerWeights:
        """Return what a block multiplies with, gates on the inputs of `o` and `down`."""
        weights = dict(self._layer.weights())
        for name, each in self.gates.items():
            weights[name] = _gated(weights[name], each.values())
        return weights

    def final(self) -> dict[str, Tensor]:
        """Return the tensors that training changed, without gates."""
        return self._layer.final()


def open_share(together: Sequence[Gates], shift: float = 0.0) -> float:
    """Return the expected share of weights whose gates are not shut, logits shifted."""
    whole = sum(each.size * len(each.logits) for each in together)
    opened = sum(
        each.size * float(open_chances(each.logits.detach() + shift).double().sum())
        for each in together
    )
    return opened / whole


def shift_to(together: Sequence[Gates], share: float) -> None:
    """Shift all logits by one number so that a share, 0 to 1, is expected to be open."""
    import torch

    low, high = -60.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if open_share(together, middle) > share else (middle, high)
    with torch.no_grad():
        for each in together:
            each.logits.add_(high)


def keep_size(together: Sequence[Gates]) -> None:
    """Take from the gradients of the logits what changes the expected size, in place."""
    import torch

    slopes, gradients = [], []
    for each in together:
        assert each.logits.grad is not None
        chances = open_chances(each.logits.detach())
        slopes.append(each.size * chances * (1 - chances))
        gradients.append(each.logits.grad)
    slope, gradient = torch.cat(slopes), torch.cat(gradients)
    multiplier = float(slope @ gradient) / max(float(slope @ slope), 1e-30)
    for own, each_gradient in zip(slopes, gradients, strict=True):
        each_gradient.sub_(multiplier * own)


def start_logits(scores: Tensor) -> Tensor:
    """Return logits of gates, float32 [units], that have the order of the scores.

    They are the normal quantiles of the ranks, so that no score is far from the others.
    """
    import torch

    ranks = scores.argsort(stable=True).argsort(stable=True).double()
    quantiles = torch.special.ndtri((ranks + 0.5) / len(scores))
    logits: Tensor = (quantiles + _START).float()
    return logits


def gate_values(logits: Tensor, noise: Tensor) -> Tensor:
    """Return gates between 0 and 1 for noise between 0 and 1, both excluded."""
    import torch

    soft = torch.sigmoid((noise.logit() + logits) / TEMPERATURE)
    opened: Tensor = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
    return opened


def open_chances(logits: Tensor) -> Tensor:
    """Return the probabilities that gates are not shut."""
    import torch

    chances: Tensor = torch.sigmoid(logits - _SHIFT)
    return chances


def _gated(matrix: Matrix, gate: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product with gated inputs, each gate for as many inputs as a unit has."""
    from torch import Tensor
    from torch.nn import functional as F

    def product(x: Tensor) -> Tensor:
        gated = x * gate.repeat_interleave(x.shape[-1] // len(gate))
        made: Tensor = F.linear(gated, matrix) if isinstance(matrix, Tensor) else matrix(gated)
        return made

    return product

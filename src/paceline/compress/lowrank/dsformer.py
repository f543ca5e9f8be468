"""DSFormer: a dictionary of few rows, and sparse codes that make each row of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from paceline.compress.base import Statistic, Statistics, WeightCompressor
from paceline.compress.lowrank.base import Factorizer, store
from paceline.compress.reconstruct.descent import best_parameters
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.registry import Source, check_range, factorizers

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.tensors import Linear

_PATTERNS = {"1:4": (1, 4), "2:4": (2, 4), "1:8": (1, 8)}
_DAMPING = 1e-3  # share of the mean square that is added where codes are solved for


@factorizers.register("dsformer", Exactness.LOSSY)
@dataclass(frozen=True)
class DSFormer(Factorizer):
    """Factor a matrix into semi-structured sparse codes [out, r] and a dense dictionary [r, in].

    Of every M neighbouring codes of a row, N are not zero, so that a dictionary has more rows than
    a product of dense factors has ranks. Both are learned together on the squared error of the
    outputs: the codes stay dense behind the scenes, are cut to the pattern in every step, and get
    their gradients as if they were not (straight-through).

    Attributes:
        keep: as of every factorizer; the bitmap of the codes counts, too.
        bits: of the dictionary's numbers, as of every factorizer; codes have 16.
        pattern: `1:4`, `2:4` or `1:8`, how many codes of how many neighbours. Default 1:4.
        steps: of training, 0 to 10000. Default 40.
        rate: of training, in units of the mean absolute number, 0 to 1. Default 0.03.
    """

    pattern: str = "1:4"
    steps: int = 40
    rate: float = 0.03

    source = Source(
        authors="Chand et al.",
        title="DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight "
        "Factorization",
        arxiv="2312.13211",
        section="sections 3 and 4",
        note="trained matrix by matrix on the outputs for calibration texts, not on a task",
    )
    catalogue = (162,)
    missing = MappingProxyType(
        {162: "training of all factors on the loss of a task: each matrix has its own outputs"}
    )
    examples = ("dsformer", "dsformer:pattern=2:4,bits=8,steps=5")
    statistics = frozenset({Statistic.SECOND_MOMENT})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(0, 10_000, self.name, steps=self.steps)
        check_range(0.0, 1.0, self.name, rate=self.rate)
        if self.pattern not in _PATTERNS:
            raise MethodError(
                f"{self.name}:pattern is {self.pattern!r}, expected {', '.join(_PATTERNS)}"
            )

    @property
    def quick(self) -> WeightCompressor:
        """The factors before they are trained."""
        return replace(self, steps=0)

    def size(self, rows: int, columns: int) -> int:
        """Return how many rows the dictionary of a matrix has, a multiple of M."""
        some, of = _PATTERNS[self.pattern]
        codes = some / of + 1 / 16  # and a bit of the bitmap, in numbers
        return max(1, int(self.keep * rows * columns / (columns + rows * codes)) // of) * of

    def compress(self, weight: Tensor, stats: Statistics) -> Linear:
        """See `WeightCompressor`."""
        import numpy as np

        from paceline.models.tensors import LowRank, Sparse

        size = self.size(*weight.shape)
        if self.keep == 1 or size >= len(weight):
            return store(weight, self.bits)
        root, _ = stats.whitener
        codes, rows = _begin(weight @ root, size)
        codes, dictionary = self._train(weight, root, codes, weight[rows])
        kept = self._select(codes)
        with np.errstate(over="ignore"):
            values = codes[kept].numpy().astype(np.float16)
        if not np.isfinite(values).all():
            raise MethodError("the codes of a matrix are too large for half precision")
        sparse = Sparse(kept.numpy(), values, "F16", _PATTERNS[self.pattern])
        return LowRank(sparse, store(dictionary.contiguous(), self.bits))

    def _select(self, codes: Tensor) -> Tensor:
        """Return which codes stay, bool [out, r]: the largest of each group."""
        import torch

        some, of = _PATTERNS[self.pattern]
        groups = codes.abs().view(len(codes), -1, of)
        best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :some]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(1)

    def _train(
        self, weight: Tensor, root: Tensor, codes: Tensor, dictionary: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return codes, still dense, and the dictionary after training."""
        target = weight @ root
        energy = target.square().sum().clamp(min=1e-30)

        def loss(parts: list[Tensor]) -> Tensor:
            dense, rows = parts
            cut = (dense * self._select(dense.detach())).detach()
            passed = cut + dense - dense.detach()  # the values of one, the gradients of the other
            return (target - passed @ (rows @ root)).square().sum() / energy

        trained = best_parameters([codes, dictionary], loss, self.steps, self.rate)
        return trained[0], trained[1]


def _begin(target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return codes [out, size] and which rows of the matrix itself are the dictionary at first.

    The rows are those that an LU decomposition of the left singular vectors picks; each of them has
    one code, the others those of least squares.

    Args:
        target: the matrix after whitening, [out, in].
        size: rows of the dictionary.
    """
    import torch

    left = torch.linalg.svd(target, full_matrices=False)[0][:, :size]
    rows = torch.linalg.lu(left)[0].argmax(0)[:size]
    atoms = target[rows].double()
    products = atoms @ atoms.T
    products.diagonal().add_(_DAMPING * float(products.diagonal().mean()) + 1e-30)
    codes = torch.linalg.solve(products, atoms @ target.T.double()).T.float()
    codes[rows] = torch.eye(size)
    return codes.contiguous(), rows

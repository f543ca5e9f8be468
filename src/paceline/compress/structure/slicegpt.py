"""SliceGPT: rotate the residual stream, and delete the directions in which it hardly varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from paceline.compress.structure.base import KeptLayer, Structure, StructureMethod
from paceline.compress.whole_model import WholeModel
from paceline.core import Exactness
from paceline.errors import MethodError
from paceline.models.config import ModelConfig
from paceline.registry import Source, check_range, structures

if TYPE_CHECKING:
    from torch import Tensor

_READ = {"attn_norm": ("q", "k", "v"), "mlp_norm": ("gate", "up")}  # norm -> what reads it
_WRITTEN = ("o", "down")


@structures.register("slicegpt", Exactness.LOSSY)
@dataclass(frozen=True)
class SliceGPT(StructureMethod):
    """Make the hidden size smaller: every matrix loses rows or columns in a rotated basis.

    A model with RMS norms computes the same in any orthogonal basis of its residual stream, once
    the weights of the norms are part of the matrices that follow. The basis are the principal
    directions of the stream, each position scaled as a norm scales it, over all layers; the last
    ones are deleted from embedding, head and all matrices. Embedding and head differ afterwards.

    Attributes:
        share: of the hidden size that is deleted, 0 to 0.9; 0 only rotates. Default 0.1.
        multiple: the hidden size stays a multiple of it, 1 to 1024. Default 32.
        rotate: whether the basis is rotated; without, the coordinates with the smallest variance
            go, for comparison. Default true.
    """

    share: float = 0.1
    multiple: int = 32
    rotate: bool = True

    source = Source(
        authors="Ashkboos et al.",
        title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        arxiv="2401.15024",
        section="section 3",
        note="one rotation for all layers: the paper's own for each needs products in the residual "
        "stream that no engine here has",
    )
    catalogue = (398,)
    missing = {398: "a rotation for each block; models with layer norms"}
    examples = ("slicegpt:multiple=4", "slicegpt:share=0.05,multiple=4,rotate=false")
    changes_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range(0.0, 0.9, self.name, share=self.share)
        check_range(1, 1024, self.name, multiple=self.multiple)

    def restructure(self, model: WholeModel, base: WholeModel, folder: Path) -> Structure:
        """See `StructureMethod`."""
        _check(self.name, model)
        old = model.config.hidden_size
        size = max(round((1 - self.share) * old / self.multiple), 1) * self.multiple
        if size >= old and self.share:
            raise MethodError(
                f"{self.name}:share={self.share} of a hidden size of {old} is no whole multiple of "
                f"{self.multiple}; take a larger share, or a smaller multiple"
            )
        size = min(size, old)
        basis, kept = self._basis(model, size)
        config = replace(model.config, hidden_size=size, tied=False)
        layers = [
            KeptLayer(index, shape, _sliced_layer(model.layer(index), basis, config))
            for index, shape in enumerate(model.config.layers)
        ]
        note = (
            f"{self.name} left {size} of {old} directions of the residual stream, which hold "
            f"{kept:.2%} of it."
        )
        return Structure(layers, note, _sliced_outer(model, basis, config), config)

    def _basis(self, model: WholeModel, size: int) -> tuple[Tensor, float]:
        """Return the directions that stay, float32 [hidden, size], and how much they hold."""
        import torch

        moment = _moment(model)
        if self.rotate:
            values, vectors = torch.linalg.eigh(moment)
            basis = vectors.flip(1)[:, :size]
            kept = float(values.flip(0)[:size].sum() / values.sum())
        else:
            order = moment.diagonal().argsort(descending=True, stable=True)[:size].sort().values
            basis = torch.eye(len(moment), dtype=moment.dtype)[:, order]
            kept = float(moment.diagonal()[order].sum() / moment.diagonal().sum())
        return basis.float().contiguous(), kept


def _moment(model: WholeModel) -> Tensor:
    """Return the second moment of the residual stream, float64 [hidden, hidden].

    Of the inputs of all layers and the output of the last one, each position scaled to unit size.
    """
    import torch

    hidden = model.config.hidden_size
    moment = torch.zeros(hidden, hidden, dtype=torch.float64)
    x = model.embed(model.texts)
    for index in range(len(model.config.layers) + 1):
        flat = x.flatten(0, 1)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
        moment += (flat.T @ flat).double()
        if index < len(model.config.layers):
            x = model.run(index, x)
    return moment


def _sliced_layer(
    weights: Mapping[str, Tensor], basis: Tensor, config: ModelConfig
) -> dict[str, Tensor]:
    """Return the tensors of a layer in the new basis, norms without weights of their own."""
    made: dict[str, Tensor] = {}
    for norm, readers in _READ.items():
        if norm not in weights:
            continue
        scale = config.norm_offset + weights[norm]
        made[norm] = _plain_norm(basis, config)
        for name in readers:
            if name in weights:
                made[name] = ((weights[name] * scale) @ basis).contiguous()
    for name in _WRITTEN:
        for full in (name, f"{name}.bias"):
            if full in weights:
                made[full] = (basis.T @ weights[full]).contiguous()
    return made


def _sliced_outer(model: WholeModel, basis: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Return what lies outside the layers in the new basis; the head is one of its own."""
    outer = model.outer
    scale = config.norm_offset + outer["final_norm"]
    head = outer["embed" if model.config.tied else "head"]
    made = {
        "embed": (outer["embed"] @ basis).contiguous(),
        "head": ((head * scale) @ basis).contiguous(),
        "final_norm": _plain_norm(basis, config),
    }
    if "positions" in outer:
        made["positions"] = (outer["positions"] @ basis).contiguous()
    return made


def _plain_norm(basis: Tensor, config: ModelConfig) -> Tensor:
    """Return the weights of a norm that divides by the size of the whole stream, [size].

    The engine's norm takes the mean square over fewer channels, which the root of the ratio undoes.
    """
    import torch

    old, size = basis.shape
    return torch.full((size,), float((old / size) ** 0.5) - config.norm_offset)


def _check(name: str, model: WholeModel) -> None:
    """Refuse models that another basis would change.

    Raises:
        MethodError: names what stands against it.
    """
    config, weights = model.config, model.layer(0)
    found = [each for each in ("attn_post_norm", "mlp_post_norm") if each in weights]
    reason = ""
    if config.norm != "rms":
        reason = f"norms of the kind {config.norm!r}, which subtract a mean"
    elif found or not config.pre_norm:
        reason = "norms behind attention or MLP"
    elif config.embedding_scale != 1.0:
        reason = "an embedding that is scaled by the hidden size"
    if reason:
        raise MethodError(
            f"{name} rotates the residual stream, and this model has {reason}; take narrow or "
            "layer_drop"
        )

"""Compress a checkpoint into a GGUF file, as `CompressionJob` does into a folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from paceline.compress.base import Statistics, WeightCompressor
from paceline.compress.checkpoint import Size, stored_size
from paceline.compress.job import CompressionJob
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.models.export.assembly import as_matrix, form_name
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_types import own_type, parse_gguf_format
from paceline.models.tensors import Linear

if TYPE_CHECKING:
    from paceline.compress.pipeline import CompressedBlock

_KEEP = "auto"  # every matrix in the type that holds it as it is


@dataclass
class GGUFJob(CompressionJob):
    """The compression of one checkpoint into a GGUF file; see `CompressionJob`.

    Recipes whose matrices GGUF has no type for are refused: head and embedding before the work
    begins, others at the first such block.
    """

    def __post_init__(self) -> None:
        """Check source and target, and that GGUF can describe the model."""
        super().__post_init__()
        export = GGUFExport(self.model, parse_gguf_format(_KEEP))
        for names in export.fused:
            _check_fused(names, [self._methods(name) for name in names])
        if self.recipe.head.compressors:
            import torch

            for name in ("embed", "head"):
                if name in self.model.weights:
                    row = torch.from_numpy(np.array(self.model.weights.dense(name)[:1]))
                    _check(name, self.recipe.head.compress(row, Statistics()))

    def _methods(self, name: str) -> tuple[WeightCompressor, ...]:
        """Return what compresses a matrix."""
        return self.recipe.steps_of(name).for_matrix(name, self.model.config).compressors

    def _check_target(self) -> None:
        if self.out.is_dir():
            raise RequestError(f"{self.out} is a folder, expected the name of a new file")
        if self.out.exists():
            raise RequestError(f"{self.out} exists already; name a new file")

    def _check_block(self, block: CompressedBlock) -> None:
        for name, weight in block.tensors.items():
            if isinstance(weight, Linear):
                try:
                    _check(f"layers.{block.index}.{name}", weight)
                except MethodError:
                    shutil.rmtree(self.work_path, ignore_errors=True)  # it would end here again
                    raise

    def _finish(self, draft: Path, size: Size) -> Size:
        """Write the file from the finished folder."""
        export = GGUFExport(load(draft), parse_gguf_format(_KEEP))
        if export.unsupported:
            shutil.rmtree(self.work_path, ignore_errors=True)  # it would end here again
            raise MethodError(_refusal(export.unsupported))
        export.write(self.out)
        return stored_size(load(self.out))


def _check_fused(names: tuple[str, ...], methods: list[tuple[WeightCompressor, ...]]) -> None:
    """Refuse different types for matrices that a file has in one tensor."""
    if any(each != methods[0] for each in methods):
        raise MethodError(
            f"GGUF stores {' and '.join(names)} in one tensor, and the recipe gives them different "
            "types; take the same for all, e.g. gguf:type=q4_k, or write a folder instead"
        )


def _check(name: str, matrix: Linear) -> None:
    """Refuse a matrix that GGUF has no type for."""
    if own_type(as_matrix(matrix)) is None:
        raise MethodError(_refusal(f"{name} ({form_name(matrix)})"))


def _refusal(what: str) -> str:
    return (
        f"GGUF has no type for {what}; write a folder instead, or take another recipe, e.g. "
        "gguf:type=q4_k"
    )

"""Errors of columns that the columns after them make up for: the solver of GPTQ and SparseGPT.

Both change a matrix column by column, and move the error of each into those that are still to
come, as the inverse of the second moment of the inputs says. The triangular factor of that inverse
is made in the memory of the matrix.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from paceline.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = 128  # columns whose errors reach the rest of the matrix in one product
_BLOCK = 1024  # columns that are factored at once
_Function = TypeVar("_Function", bound=Callable[..., Any])


def replace_columns(
    weight: Tensor, factor: Tensor, replace: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Replace the columns of a matrix in order, and move the error of each into those after it.

    The squared error of the outputs is the smallest that the later columns can reach.

    Args:
        weight: float32 [out, in]; not written to.
        factor: upper Cholesky factor of the inverse of the inputs' second moment, [in, in].
        replace: returns what stands for the column `at`, [out, 1], given `at` and the matrix as it
            is by then: all columns up to the next multiple of `TOGETHER` have the errors of those
            before `at`, and the rest those of earlier multiples.

    Returns:
        the new columns, float32 [out, in].
    """
    import torch

    rest, values, columns = weight.clone(), torch.empty_like(weight), weight.shape[1]
    for start in range(0, columns, TOGETHER):
        end = min(start + TOGETHER, columns)
        errors = torch.empty(len(weight), end - start)
        for at in range(start, end):
            column = rest[:, at : at + 1]
            values[:, at : at + 1] = value = replace(at, rest)
            error = (column - value) / factor[at, at]
            rest[:, at:end] -= error * factor[at, at:end]
            errors[:, at - start] = error[:, 0]
        rest[:, end:] -= errors @ factor[start:end, end:]
    return values


def keep_last(function: _Function) -> _Function:
    """Keep the last result of a function while the matrix that is its first argument lives.

    Matrices with one input follow one another, and share their second moment.
    """
    last: list[tuple[weakref.ref[Any], object, Any]] = []

    @functools.wraps(function)
    def kept(moment: Tensor, *args: Any) -> Any:
        if last and last[0][0]() is moment and last[0][1] == args:
            return last[0][2]
        last.clear()
        result = function(moment, *args)
        last[:] = [(weakref.ref(moment, lambda _: last.clear()), args, result)]
        return result

    return cast("_Function", kept)


def inverse_factor(
    moment: Tensor, damping: float, name: str, order: Tensor | None = None
) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a damped second moment, [in, in].

    With H the damped moment and P the matrix that turns the order round, P H P = L L' gives the
    factor as P L^-1 P: one factorisation and one inversion, both in place and in double precision.

    Args:
        moment: float32 [in, in]; not written to.
        damping: share of the mean diagonal that is added to it.
        name: of the method, for messages.
        order: of the columns, int64 [in]; as they stand if None.

    Raises:
        MethodError: the matrix cannot be inverted.
    """
    import torch

    columns = len(moment)
    turned = torch.arange(columns - 1, -1, -1) if order is None else order.flip(0)
    matrix = torch.empty(columns, columns, dtype=torch.float64)
    for start in range(0, columns, _BLOCK):
        rows = turned[start : start + _BLOCK]
        matrix[start : start + _BLOCK] = moment[rows][:, turned]
    diagonal = matrix.diagonal()
    added = damping * diagonal.mean().clamp(min=1e-12)
    diagonal += (diagonal == 0).double() + added
    try:
        _cholesky(matrix)
    except RuntimeError:
        raise MethodError(
            f"the inputs of a matrix are too alike on the calibration texts for {name}; give more "
            f"text, or raise {name}:damping={damping}"
        ) from None
    _invert_lower(matrix)
    factor = matrix.float()
    del matrix  # of several hundred megabytes, which turning round would need beside it
    return factor.flip(0, 1)


def _cholesky(matrix: Tensor) -> None:
    """Replace a positive definite matrix by its lower Cholesky factor.

    Raises:
        RuntimeError: it is not positive definite.
    """
    import torch

    size = len(matrix)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        before = matrix[start:end, :start]
        factor = torch.linalg.cholesky(matrix[start:end, start:end] - before @ before.T)
        matrix[start:end, start:end] = factor
        if end < size:
            below = matrix[end:, start:end] - matrix[end:, :start] @ before.T
            solved = torch.linalg.solve_triangular(factor, below.T, upper=False)
            matrix[end:, start:end] = solved.T
    matrix.tril_()


def _invert_lower(matrix: Tensor) -> None:
    """Replace a lower triangular matrix by its inverse."""
    import torch

    size = len(matrix)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        factor = matrix[start:end, start:end]
        own = torch.linalg.solve_triangular(factor, torch.eye(end - start).double(), upper=False)
        if start:
            before = matrix[start:end, :start] @ matrix[:start, :start]
            matrix[start:end, :start] = -own @ before
        matrix[start:end, start:end] = own

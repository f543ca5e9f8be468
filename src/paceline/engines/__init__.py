"""Engines run a model over token trees. `base.py` is the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.engines.base import Engine
from paceline.errors import MethodError, unknown

if TYPE_CHECKING:
    from paceline.models import Model

NAMES = ("auto", "native", "reference")


def open_engine(
    model: Model, name: str = "auto", *, threads: int | None = None, device: str | None = None
) -> Engine:
    """An engine with the model's weights in it; `auto` is native unless a device is named.

    Raises:
        MethodError: unknown name, settings that the engine has no use for, or torch is missing.
    """
    if name not in NAMES:
        raise MethodError(unknown("engine", name, NAMES))
    if name == "reference" or (name == "auto" and device):
        if threads is not None:
            raise MethodError("threads belong to the native engine; leave them out")
        try:
            from paceline.engines.reference import ReferenceEngine
        except ModuleNotFoundError as error:
            raise MethodError(
                "the reference engine needs torch; install paceline[torch]"
            ) from error
        return ReferenceEngine(model.config, model.weights, device=device or "cpu")
    if device:
        raise MethodError(f"the native engine runs on the CPU, not on {device!r}; leave device out")
    from paceline.engines.native import NativeEngine

    return NativeEngine(model.config, model.weights, threads=threads)

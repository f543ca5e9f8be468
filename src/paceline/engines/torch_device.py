"""Devices of the torch engines."""

from __future__ import annotations

import torch

from paceline.errors import MethodError


def open_device(name: str) -> torch.device:
    """Return a torch device that works here.

    Raises:
        MethodError: torch has none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise MethodError(f"torch cannot use the device {name!r} here: {reason}") from None
    return device

"""Which layout of packed weights a config.json speaks of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paceline.models.formats.awq import AWQLayout
from paceline.models.formats.compressed_tensors import CompressedTensorsLayout
from paceline.models.formats.gptq import GPTQLayout
from paceline.models.formats.packed import Packing
from paceline.models.formats.stored_forms import QUANT_METHOD, StoredForms

_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any]], Packing]] = {
    "compressed-tensors": CompressedTensorsLayout.of,
    "gptq": GPTQLayout.of,
    "awq": AWQLayout.of,
    QUANT_METHOD: StoredForms.of,
}


def read_packing(values: Mapping[str, Any]) -> Packing | None:
    """Return the layout of a config.json's `quantization_config`; None where none is known.

    Raises:
        ModelError: a known layout with a setting that cannot be read.
    """
    scheme = values.get("quantization_config")
    if not isinstance(scheme, dict):
        return None
    layout = _LAYOUTS.get(str(scheme.get("quant_method")))
    return None if layout is None else layout(scheme)

"""Choose the type of each tensor of a GGUF file: `q4_k`, or `q4_k:head=q8_0` for both ends."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import MethodError, unknown
from paceline.method_spec import parse_spec
from paceline.models.export.gguf_mixes import MIXES, Position
from paceline.models.formats.gguf_quantize import WRITABLE
from paceline.models.formats.gguf_repack import block_type
from paceline.models.formats.gguf_types import TYPES
from paceline.models.tensors import BlockQuantized, Dense, Grouped, Linear

AUTO = "auto"
NAMES = (AUTO, *(name.lower() for name in WRITABLE))
LAYERS = (*NAMES, *(name.lower() for name in MIXES))
# As everywhere in Paceline, and as the reader of hub checkpoints would write them.
_ALIASES = {"fp32": "f32", "fp16": "f16", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# Embedding and head feel coarse rounding most; a tied one is both.
_HEADS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL"), "Q6_K"),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", *MIXES), "Q6_K"),
}
# For rows that are no multiple of 256, as in llama.cpp (`llama-quant.cpp`).
_FALLBACKS = {
    **{"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
    **{"TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL"},
}
# `general.file_type`: what most matrices of a file are (`llama_ftype`).
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7},
    **{"Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18},
    **{"IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38},
}


@dataclass(frozen=True)
class GGUFFormat:
    """Types of the matrices in the layers, and of embedding and head; None keeps what there is.

    The layers may have a mix, a name of `MIXES`.
    """

    layers: str | None
    head: str | None

    def choose(self, matrix: Linear, at: Position | None) -> tuple[str, str | None]:
        """Return the type of a matrix, and the one that it would have if its rows were longer.

        Args:
            matrix: as it is stored.
            at: where it lies in the layers; None for embedding and head.
        """
        wanted = self.head if at is None else self.layers
        if mix := MIXES.get(wanted or ""):
            wanted = mix.choose(at)
        wanted = wanted or own_type(matrix) or "F16"
        chosen = fit_type(wanted, matrix.shape[1])
        return chosen, None if chosen == wanted else wanted


def fit_type(name: str, inputs: int) -> str:
    """Return a type, or the one that llama.cpp takes instead for rows that are no whole blocks."""
    while inputs % TYPES[name].weights:
        name = _FALLBACKS.get(name, "F16")
    return name


def own_type(matrix: Linear) -> str | None:
    """Return the type that holds a matrix as it is; None for forms that GGUF has no type for."""
    if isinstance(matrix, BlockQuantized):
        return matrix.type
    if isinstance(matrix, Grouped):
        return block_type(matrix)
    return matrix.dtype if isinstance(matrix, Dense) else None


def parse_gguf_format(text: str) -> GGUFFormat:
    """Parse `auto`, `TYPE` or `TYPE:head=TYPE`; the head is Q6_K beside types of fewer bits.

    Raises:
        MethodError: another form, or an unknown name.
    """
    spec = parse_spec(text)
    if set(spec.settings) - {"head"}:
        raise MethodError(f"format {text!r} is not of the form FORMAT or FORMAT:head=FORMAT")
    layers = _type(spec.name, LAYERS)
    if "head" in spec.settings:
        return GGUFFormat(layers, _type(spec.settings["head"]))
    return GGUFFormat(layers, _HEADS.get(layers, layers) if layers else None)


def _type(name: str, known: tuple[str, ...] = NAMES) -> str | None:
    name = _ALIASES.get(name.lower(), name.lower())
    if name not in known:
        raise MethodError(unknown("format", name, known))
    return None if name == AUTO else name.upper()

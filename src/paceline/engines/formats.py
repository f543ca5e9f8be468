"""How weights are stored: `int4`, or `int4:head=bf16` where embedding and head have their own."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.errors import MethodError, ModelError, unknown
from paceline.method_spec import parse_spec

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4", "ternary")
HEADS = ("fp32", "bf16", "fp16", "int8", "int4")
_HEADS = {"int4": "int8", "ternary": "int8"}  # unless said otherwise; the others are their own


class NotTernaryError(ModelError):
    """Weights that `ternary` cannot hold."""


@dataclass(frozen=True)
class Format:
    """Of the matrices in the layers, and of embedding and head.

    Embedding and head are a small part of a large model and feel coarse rounding most: int8 is
    their default beside int4 and ternary.
    """

    layers: str
    head: str

    def __str__(self) -> str:
        return self.layers if self.layers == self.head else f"{self.layers}:head={self.head}"


def parse_format(text: str) -> Format:
    """Parse `LAYERS` or `LAYERS:head=HEAD`; `LAYERS,head=HEAD` is the earlier spelling.

    Raises:
        MethodError: another form, or an unknown name.
    """
    earlier = "," in text and ":" not in text
    spec = parse_spec(text.replace(",", ":", 1) if earlier else text)
    layers = spec.name
    if layers not in FORMATS:
        raise MethodError(unknown("format", layers, FORMATS))
    if text == layers:
        return Format(layers, _HEADS.get(layers, layers))
    if list(spec.settings) != ["head"]:
        raise MethodError(f"format {text!r} is not of the form FORMAT or FORMAT:head=FORMAT")
    head = spec.settings["head"]
    if head not in HEADS:
        raise MethodError(unknown("format of the head", head, HEADS))
    return Format(layers, head)

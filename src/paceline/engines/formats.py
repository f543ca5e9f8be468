"""Weight formats of the native engine: `int4`, or `int4:head=bf16` with one for embedding and head.

`act=int8` rounds what is multiplied with the blocks of a GGUF file, or with integers in groups, to
8 bits: `auto:act=int8`, `int4:act=int8`.

Names, default formats of heads and sizes are those of the compiled kernels
(`native/kernels/formats/all.hpp`).
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline import _native
from paceline.errors import MethodError, ModelError, unknown
from paceline.method_spec import MethodSpec, parse_spec

_KNOWN = _native.weight_formats()
FORMATS = tuple(name for name, _, _, _, kind in _KNOWN if kind == "floats")  # to choose from
GGUF_FORMATS = tuple(name for name, _, _, _, kind in _KNOWN if kind == "blocks")  # a file's own
GROUP_FORMATS = tuple(name for name, _, _, _, kind in _KNOWN if kind == "groups")  # of integers
SPARSE_FORMATS = tuple(name for name, _, _, _, kind in _KNOWN if kind == "sparse")  # without zeros
ROW_FORMATS = tuple(name for name, _, _, _, kind in _KNOWN if kind == "rows")  # of packed codes
HEADS = tuple(name for name, _, for_heads, _, kind in _KNOWN if kind == "floats" and for_heads)
BITS = {name: bits for name, _, _, bits, _ in _KNOWN}  # of a weight
ACTIVATIONS = ("int16", "int8", "auto")  # of the products with GGUF blocks and groups of integers
_DEFAULT_HEADS = {name: head for name, head, _, _, _ in _KNOWN}


class NotTernaryError(ModelError):
    """Weights that `ternary` cannot hold."""


@dataclass(frozen=True)
class Format:
    """Formats of the matrices in the layers, and of embedding and head.

    Embedding and head are a small part of a large model and feel coarse rounding most: 8 bits are
    their default beside 4 bits and ternary.
    """

    layers: str
    head: str

    def __str__(self) -> str:
        return self.layers if self.layers == self.head else f"{self.layers}:head={self.head}"


def split_activations(text: str) -> tuple[str, str]:
    """Split a format into the weights' and that of activations: `auto:act=int8` -> `auto`, `int8`.

    Where none is named, it is `int16`.

    Raises:
        MethodError: the activations have no such format.
    """
    spec = _spec(text)
    act = spec.settings.get("act")
    if act is None:
        return text, ACTIVATIONS[0]
    if act not in ACTIVATIONS:
        raise MethodError(unknown("format of activations", act, ACTIVATIONS))
    settings = {key: value for key, value in spec.settings.items() if key != "act"}
    return str(MethodSpec(spec.name, settings)), act


def with_activations(text: str, act: str) -> str:
    """Return a format of weights with one of activations, as `split_activations` reads it."""
    if act == ACTIVATIONS[0]:
        return text
    return f"{text}{',' if ':' in text else ':'}act={act}"


def parse_format(text: str) -> Format:
    """Parse `LAYERS` or `LAYERS:head=HEAD`; `LAYERS,head=HEAD` is the earlier spelling.

    Raises:
        MethodError: another form, an unknown name, or one that no weights can be rounded to.
    """
    spec = _spec(text)
    layers = spec.name
    _check("format", layers, FORMATS)
    if text == layers:
        return Format(layers, _DEFAULT_HEADS[layers])
    if list(spec.settings) != ["head"]:
        raise MethodError(f"format {text!r} is not of the form FORMAT or FORMAT:head=FORMAT")
    head = spec.settings["head"]
    _check("format of the head", head, HEADS)
    return Format(layers, head)


def _spec(text: str) -> MethodSpec:
    earlier = "," in text and ":" not in text
    return parse_spec(text.replace(",", ":", 1) if earlier else text)


def _check(what: str, name: str, choices: tuple[str, ...]) -> None:
    if name in GGUF_FORMATS + GROUP_FORMATS + SPARSE_FORMATS + ROW_FORMATS:
        file = "a GGUF file" if name in GGUF_FORMATS else "a checkpoint"
        raise MethodError(
            f"{what} {name!r} holds only weights that {file} stores so; leave it out to keep "
            f"them, or choose one of {', '.join(choices)}"
        )
    if name not in choices:
        raise MethodError(unknown(what, name, choices))

"""Mixes of GGUF types: more bits for the matrices that feel rounding most, as llama.cpp chooses.

A mix is named after the type of most matrices: `Q4_K_M` is Q4_K with Q6_K for half of the values
and down projections. The rules are those of `llama_tensor_get_type` in `llama-quant.cpp` for dense
models; its `Q2_K` is called `Q2_K_M` here, where `Q2_K` is that type for every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from paceline.models.config import ModelConfig


@dataclass(frozen=True)
class Position:
    """Where a matrix lies in a model.

    Attributes:
        part: its name in the layer, e.g. `v`; `qkv` is a tensor of all three.
        layer: its index.
        layers: number of layers.
        sharing: query heads for each key/value head.
    """

    part: str
    layer: int
    layers: int
    sharing: int

    @classmethod
    def of(cls, names: Sequence[str], config: ModelConfig) -> Position | None:
        """Return the position of a tensor by the canonical names of its parts.

        None outside the layers.
        """
        owner, _, part = names[0].rpartition(".")
        if len(names) > 1 and part == "q":
            part = "qkv"
        if not owner.startswith("layers."):
            return None
        index = int(owner.removeprefix("layers."))
        layer = config.layers[index]
        return cls(part, index, len(config.layers), layer.heads // max(1, layer.kv_heads))

    @property
    def is_sensitive(self) -> bool:
        """Whether the layer is of the first or last eighth, or a third one between them."""
        eighth = self.layers // 8
        at = self.layer
        return at < eighth or at >= 7 * self.layers // 8 or (at - eighth) % 3 == 2


Rule = Callable[[Position], str | None]  # the type of a matrix, or None for the mix's own


def _half_six(at: Position) -> str | None:
    return "Q6_K" if at.is_sensitive else None


def _always(kind: str) -> Rule:
    return lambda at: kind


@dataclass(frozen=True)
class Mix:
    """A mix of types.

    Attributes:
        type: of the matrices without a rule.
        rules: by the name of a matrix in its layer.
        file_type: `general.file_type` of llama.cpp.
    """

    type: str
    file_type: int
    rules: Mapping[str, Rule]

    def choose(self, at: Position | None) -> str:
        """Return the type of a matrix."""
        rule = None if at is None else self.rules.get(at.part)
        return (rule(at) if rule and at else None) or self.type


MIXES: Mapping[str, Mix] = {
    "Q2_K_M": Mix(
        "Q2_K",
        10,
        {
            "v": lambda at: "Q4_K" if at.sharing >= 4 else "Q3_K",
            "o": _always("Q3_K"),
            "down": _always("Q3_K"),
        },
    ),
    "Q3_K_S": Mix("Q3_K", 11, {}),
    "Q3_K_M": Mix(
        "Q3_K",
        12,
        {
            "v": lambda at: "Q5_K" if at.layer < 2 else "Q4_K",
            "o": _always("Q4_K"),
            "qkv": _always("Q4_K"),
            "down": lambda at: "Q5_K" if at.layer < at.layers // 16 else "Q4_K",
        },
    ),
    "Q3_K_L": Mix(
        "Q3_K",
        13,
        {**dict.fromkeys(("v", "o", "down"), _always("Q5_K")), "qkv": _always("Q4_K")},
    ),
    "Q4_K_S": Mix(
        "Q4_K",
        14,
        {
            "v": lambda at: "Q5_K" if at.layer < 4 else None,
            "down": lambda at: "Q5_K" if at.layer < at.layers // 8 else None,
        },
    ),
    "Q4_K_M": Mix("Q4_K", 15, {"v": _half_six, "down": _half_six, "qkv": _always("Q5_K")}),
    "Q5_K_S": Mix("Q5_K", 16, {}),
    "Q5_K_M": Mix("Q5_K", 17, {"v": _half_six, "down": _half_six, "qkv": _always("Q6_K")}),
}

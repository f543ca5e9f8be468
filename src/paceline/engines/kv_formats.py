"""Formats of cached keys and values that round several positions together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from paceline.abilities import Ability
from paceline.errors import MethodError, unknown
from paceline.method_spec import parse_spec
from paceline.registry import check_range

GROUP = 32  # positions, or channels, that share a scale in int4 and int3
_HALF = 16  # bits of a scale, a minimum, a factor and an outlier
GEAR = "gear"


@dataclass(frozen=True)
class GroupedFormat:
    """How keys and values are rounded once `span` positions are committed.

    Keys are rounded for each channel over `group` positions, values for each position over `group`
    channels of a head, each to a scale and a minimum in fp16.

    Attributes:
        bits: of a code, 2 to 8. Default 4.
        span: positions that are rounded together, a multiple of 32 up to 1,024; those of the span
            that is not full yet are kept in fp16. Default 128.
        group: numbers that share a scale; it divides the span. 0: keys share it over the whole
            span, values over all channels of all heads. Default 0.
        rank: of the product that approximates the errors of a span, head by head, 0 to 64: a
            factor [span, rank] times one [rank, channels], in fp16. Default 4.
        outliers: share of the numbers kept in fp16, 0 to 0.5: half of them the largest, half the
            smallest of a channel's keys in a span, and of a position's values. Default 0.02.
    """

    bits: int = 4
    span: int = 128
    group: int = 0
    rank: int = 4
    outliers: float = 0.02

    def __post_init__(self) -> None:
        check_range(2, 8, GEAR, bits=self.bits)
        check_range(GROUP, 1024, GEAR, span=self.span)
        check_range(0, 64, GEAR, rank=self.rank)
        check_range(0, 0.5, GEAR, outliers=self.outliers)
        if self.span % GROUP:
            raise MethodError(f"{GEAR}:span is {self.span}, expected a multiple of {GROUP}")
        if self.group < 0 or (self.group and self.span % self.group):
            raise MethodError(
                f"{GEAR}:group is {self.group}, expected 0 or a divisor of the span {self.span}"
            )

    def outliers_of(self, count: int) -> int:
        """Return how many of `count` numbers are kept at either end."""
        if not self.outliers:
            return 0
        return min(max(1, round(self.outliers / 2 * count)), count // 2)

    def number_bits(self, kv_heads: int, head_dim: int) -> float:
        """Return the bits of a number of a full span, in the mean over keys and values."""
        channels = kv_heads * head_dim
        shared = (self.group or self.span, min(self.group, head_dim) or channels)
        bits = self.bits + sum(2 * _HALF / count for count in shared) / 2
        rank = min(self.rank, self.span, head_dim)
        bits += rank * _HALF * (self.span + head_dim) / (self.span * head_dim)
        for count in (self.span, channels):
            place = ceil(log2(count)) if count > 1 else 0
            bits += self.outliers_of(count) / count * (_HALF + place)
        return bits


# What both engines have: as in KIVI, with neither a low rank nor outliers.
GROUPED_KV: Mapping[str, GroupedFormat] = {
    "int4": GroupedFormat(4, GROUP, GROUP, rank=0, outliers=0),
    "int3": GroupedFormat(3, GROUP, GROUP, rank=0, outliers=0),
}

# What an engine cannot do with such a cache: single rows cannot be chosen, come or leave.
NO_GROUPED_KV = frozenset(
    {Ability.POSITIONS, Ability.EVICT, Ability.ATTENTION_MASS, Ability.APPEND_ROWS}
)


def grouped_format(kv_format: str) -> GroupedFormat | None:
    """Return what int4, int3 or `gear[:key=value,...]` means; None: another format.

    Raises:
        MethodError: an unknown setting of gear, or one out of its range.
    """
    if kv_format in GROUPED_KV:
        return GROUPED_KV[kv_format]
    if kv_format.partition(":")[0] != GEAR:
        return None
    kinds = {name: type(value) for name, value in vars(GroupedFormat()).items()}
    values = {}
    for key, text in parse_spec(kv_format).settings.items():
        if key not in kinds:
            raise MethodError(unknown(f"setting of {GEAR}", key, kinds))
        try:
            values[key] = kinds[key](text)
        except ValueError:
            kind = kinds[key].__name__
            raise MethodError(f"{GEAR}:{key} is {text!r}, expected {kind}") from None
    return GroupedFormat(**values)

"""Types of tensors in GGUF files: block layouts, and their values in NumPy.

A row of a quantised matrix is a sequence of blocks. A block holds a fixed number of consecutive
weights with their scales and, for some types, minima. `dequantize` is the slow reference of every
engine: float32, each operation rounded once, equal bit for bit to the `gguf` package. In the
layouts below `d` and `m` (minimum) are float16; 4-bit codes of blocks of 32 hold weight i in the
low half of byte i and weight i + 16 in the high half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError

Bytes = NDArray[np.uint8]

_TWO_BITS = np.array([0, 2, 4, 6], np.uint8)[:, None]
_FOUR_BITS = np.array([0, 4], np.uint8)[:, None]
_EIGHT = np.arange(8, dtype=np.uint8)[:, None]
_HALF_EXPONENT = np.uint16(0x7C00)  # all bits set in what is infinite or no number
_MXFP4_LARGEST = 252  # exponent byte; above it products with codes overflow float32

_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensors that are stored in blocks.

    Attributes:
        name: as the `gguf` package and llama.cpp spell it, e.g. `Q4_K`.
        id: its number in files.
        weights: weights of a block.
        nbytes: bytes of a block.
        values: blocks uint8 [n, nbytes] -> float32 [n, weights].
        halves: offsets of the float16 numbers of a block.
    """

    name: str
    id: int
    weights: int
    nbytes: int
    values: Callable[[Bytes], Floats]
    halves: tuple[int, ...] = ()

    @property
    def bits(self) -> float:
        """Bits that a weight takes on average."""
        return 8 * self.nbytes / self.weights

    def row_bytes(self, inputs: int) -> int:
        """Return the bytes of a row.

        Raises:
            ModelError: `inputs` is no multiple of the weights of a block.
        """
        if inputs % self.weights:
            raise ModelError(
                f"rows of {inputs} inputs cannot be stored as {self.name}, expected a multiple "
                f"of {self.weights}"
            )
        return inputs // self.weights * self.nbytes

    def is_finite(self, rows: Bytes) -> bool:
        """Return whether all values of some rows uint8 [n, row bytes] are finite."""
        if self.name in ("F32", "F16", "BF16"):
            return bool(np.isfinite(self.values(rows)).all())
        blocks = rows.reshape(-1, self.nbytes)
        if self.name == "MXFP4":
            return not bool((blocks[:, 0] > _MXFP4_LARGEST).any())
        bits = (np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2") for at in self.halves)
        return not any(((half & _HALF_EXPONENT) == _HALF_EXPONENT).any() for half in bits)


def dequantize(name: str, rows: Bytes) -> Floats:
    """Return the values of some rows.

    Args:
        name: a type of `TYPES`.
        rows: uint8 [n, row bytes].

    Returns:
        float32 [n, inputs].

    Raises:
        ModelError: the rows are not whole blocks.
    """
    kind = TYPES[name]
    count, size = rows.shape
    if size % kind.nbytes:
        raise ModelError(
            f"rows of {size} bytes are no whole blocks of {name}, which have {kind.nbytes} bytes"
        )
    blocks = np.ascontiguousarray(rows).reshape(-1, kind.nbytes)
    with np.errstate(all="ignore"):  # scales that are infinite or no numbers pass through
        return kind.values(blocks).reshape(count, size // kind.nbytes * kind.weights)


def _half(blocks: Bytes, at: int) -> Floats:
    """Return the float16 number at an offset of every block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """Return the low halves of bytes [n, b], then the high ones: [n, 2 * b]."""
    return ((codes[:, None] >> _FOUR_BITS) & np.uint8(15)).reshape(len(codes), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """Return 32 bits that are stored from the lowest on, as 0 or 16: [n, 32]."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return bits << np.uint8(4)


def _float32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _float16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bfloat16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    """Return d * (code - 8). Layout: d, 16 bytes of codes."""
    codes = _nibbles(blocks[:, 2:]).astype(np.float32) - np.float32(8)
    return _half(blocks, 0) * codes


def _q4_1(blocks: Bytes) -> Floats:
    """Return d * code + m. Layout: d, m, 16 bytes of codes."""
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    """Return d * (code - 16). Layout: d, 4 bytes of fifth bits, 16 of the lower four."""
    codes = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.float32)
    return _half(blocks, 0) * (codes - np.float32(16))


def _q5_1(blocks: Bytes) -> Floats:
    """Return d * code + m. Layout: d, m, 4 bytes of fifth bits, 16 of the lower four."""
    codes = (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).astype(np.float32)
    return _half(blocks, 0) * codes + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    """Return d * code. Layout: d, 32 signed bytes."""
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _two_bits(codes: Bytes) -> Bytes:
    """Return 2-bit codes of 64 bytes [n, 64]: of each 32 bytes, four groups of 32; [n, 256]."""
    parts = codes.reshape(len(codes), -1, 1, 32) >> _TWO_BITS
    return (parts & np.uint8(3)).reshape(len(codes), -1)


def _scaled(scales: Floats, codes: NDArray[np.generic]) -> Floats:
    """Return products of scales [n, groups] with codes [n, 256], as [n, groups, -1]."""
    count, groups = scales.shape
    return scales[..., None] * codes.reshape(count, groups, -1).astype(np.float32)


def _q2_k(blocks: Bytes) -> Floats:
    """Return d * s * code - m * t for each 16 weights.

    Layout: 16 bytes with s below and t above, 64 bytes of codes, d, m.
    """
    both = blocks[:, :16]
    scales = _half(blocks, 80) * (both & np.uint8(15)).astype(np.float32)
    minima = _half(blocks, 82) * (both >> np.uint8(4)).astype(np.float32)
    return (_scaled(scales, _two_bits(blocks[:, 16:80])) - minima[..., None]).reshape(-1, 256)


def _q3_k(blocks: Bytes) -> Floats:
    """Return d * (s - 32) * code for each 16 weights, codes from -4 to 3.

    Layout: 32 bytes of third bits (bit j of byte i: weight 32 j + i), 64 bytes of the lower two,
    12 bytes of scales: the lower four bits as nibbles of 8 bytes, the upper two in the last 4; d.
    """
    low, high = _nibbles(blocks[:, 96:104]), blocks[:, 104:108]
    high = ((high[:, None] >> _TWO_BITS) & np.uint8(3)).reshape(-1, 16)
    scales = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    third = ((blocks[:, None, :32] >> _EIGHT) & np.uint8(1)).reshape(-1, 256)
    codes = (_two_bits(blocks[:, 32:96]) | (third << np.uint8(2))).astype(np.int8) - np.int8(4)
    return _scaled(_half(blocks, 108) * scales.astype(np.float32), codes).reshape(-1, 256)


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Return 8 scales and 8 minima of 6 bits from 12 bytes [n, 12], as float32 [n, 8].

    The first four of each are the lower six bits of bytes 0-3 and 4-7; of the others the lower
    four bits are the halves of bytes 8-11 and the upper two are the tops of bytes 0-3 and 4-7.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    top = np.uint8(0x30)
    scales = np.concatenate(
        (first & np.uint8(63), (rest & np.uint8(15)) | ((first >> np.uint8(2)) & top)), axis=1
    )
    minima = np.concatenate(
        (second & np.uint8(63), (rest >> np.uint8(4)) | ((second >> np.uint8(2)) & top)), axis=1
    )
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_values(blocks: Bytes, codes: Bytes) -> Floats:
    """Return d * s * code - m * t for each 32 weights. Layout: d, m, 12 bytes of s and t."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (_scaled(scales, codes) - minima[..., None]).reshape(-1, 256)


def _halves_of_32(codes: Bytes) -> Bytes:
    """Return nibbles of 128 bytes [n, 128]: of each 32 bytes the low, then the high: [n, 256]."""
    return _nibbles(codes.reshape(-1, 32)).reshape(len(codes), -1)


def _q4_k(blocks: Bytes) -> Floats:
    """Return `_k_values` of the 4-bit codes in bytes 16 to 143."""
    return _k_values(blocks, _halves_of_32(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    """Return `_k_values`: fifth bits in bytes 16 to 47 (as in Q3_K), the lower four after them."""
    fifth = ((blocks[:, None, 16:48] >> _EIGHT) & np.uint8(1)).reshape(-1, 256)
    return _k_values(blocks, _halves_of_32(blocks[:, 48:]) | (fifth << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    """Return d * s * (code - 32) for each 16 weights.

    Layout: 128 bytes of the lower four bits (of each 64 bytes the low halves, then the high), 64
    of the upper two (as 2-bit codes), 16 signed bytes s, d.
    """
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    high = _two_bits(blocks[:, 128:192])
    codes = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return _scaled(_half(blocks, 208) * scales, codes).reshape(-1, 256)


def _iq4_nl(blocks: Bytes) -> Floats:
    """Return d * value of the code in a table. Layout: d, 16 bytes of codes."""
    return _half(blocks, 0) * _IQ4[_nibbles(blocks[:, 2:])]


def _iq4_xs(blocks: Bytes) -> Floats:
    """Return d * (s - 32) * value for each 32 weights.

    Layout: d, 2 bytes of the upper two bits of s, 4 of the lower four, 128 of codes.
    """
    low = ((blocks[:, 4:8, None] >> _FOUR_BITS.T) & np.uint8(15)).reshape(-1, 8)
    high = ((blocks[:, 2:4, None] >> _TWO_BITS.T) & np.uint8(3)).reshape(-1, 8)
    scales = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    codes = _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256)
    return _scaled(_half(blocks, 0) * scales.astype(np.float32), _IQ4[codes]).reshape(-1, 256)


def _ternary_digits(packed: Bytes, digits: int) -> Bytes:
    """Return digits in base 3 of bytes [n, b], the first digits of all bytes first."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:digits, None]
    scaled = (packed[:, None] * powers).astype(np.uint16)  # modulo 256
    return ((scaled * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(packed), -1)


def _tq1_0(blocks: Bytes) -> Floats:
    """Return d * (digit - 1). Layout: 48 bytes of 5 digits (32 and 16), 4 bytes of 4, d."""
    digits = np.concatenate(
        (
            _ternary_digits(blocks[:, :32], 5),
            _ternary_digits(blocks[:, 32:48], 5),
            _ternary_digits(blocks[:, 48:52], 4),
        ),
        axis=1,
    )
    return _half(blocks, 52) * (digits.astype(np.int8) - np.int8(1)).astype(np.float32)


def _tq2_0(blocks: Bytes) -> Floats:
    """Return d * (code - 1). Layout: 64 bytes of codes, d."""
    codes = _two_bits(blocks[:, :64]).astype(np.int8) - np.int8(1)
    return _half(blocks, 64) * codes.astype(np.float32)


def _mxfp4(blocks: Bytes) -> Floats:
    """Return 2 ** (e - 128) * twice the 4-bit float. Layout: e, 16 bytes of codes.

    The smallest exponents give subnormal scales.
    """
    exponent = blocks[:, :1].astype(np.uint32)
    normal = (np.maximum(exponent, 1) - np.uint32(1)) << np.uint32(23)
    small = np.uint32(0x00200000) << np.minimum(exponent, 1)
    scales = np.where(exponent < 2, small, normal).astype(np.uint32).view(np.float32)
    return scales * _FP4[_nibbles(blocks[:, 1:])]


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, _float32),
        BlockType("F16", 1, 1, 2, _float16),
        BlockType("BF16", 30, 1, 2, _bfloat16),
        BlockType("Q4_0", 2, 32, 18, _q4_0, (0,)),
        BlockType("Q4_1", 3, 32, 20, _q4_1, (0, 2)),
        BlockType("Q5_0", 6, 32, 22, _q5_0, (0,)),
        BlockType("Q5_1", 7, 32, 24, _q5_1, (0, 2)),
        BlockType("Q8_0", 8, 32, 34, _q8_0, (0,)),
        BlockType("Q2_K", 10, 256, 84, _q2_k, (80, 82)),
        BlockType("Q3_K", 11, 256, 110, _q3_k, (108,)),
        BlockType("Q4_K", 12, 256, 144, _q4_k, (0, 2)),
        BlockType("Q5_K", 13, 256, 176, _q5_k, (0, 2)),
        BlockType("Q6_K", 14, 256, 210, _q6_k, (208,)),
        BlockType("IQ4_NL", 20, 32, 18, _iq4_nl, (0,)),
        BlockType("IQ4_XS", 23, 256, 136, _iq4_xs, (0,)),
        BlockType("TQ1_0", 34, 256, 54, _tq1_0, (52,)),
        BlockType("TQ2_0", 35, 256, 66, _tq2_0, (64,)),
        BlockType("MXFP4", 39, 32, 17, _mxfp4),
    )
}
TYPES_BY_ID: dict[int, BlockType] = {kind.id: kind for kind in TYPES.values()}

# Other types that files name, for messages. Forks of llama.cpp use some ids for types of their own.
OTHER_TYPES: dict[int, str] = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0"},
    **{4: "Q4_2, removed from GGUF", 5: "Q4_3, removed from GGUF"},
    **{31: "Q4_0_4_4, removed from GGUF", 32: "Q4_0_4_8, removed from GGUF"},
    **{33: "Q4_0_8_8, removed from GGUF", 36: "I2_S of bitnet.cpp, or IQ4_NL_4_4"},
    **{37: "IQ4_NL_4_8, removed from GGUF", 38: "TL1 of bitnet.cpp, or IQ4_NL_8_8"},
}


def type_name(number: int) -> str:
    """Return the name of a type by its number in files, for messages."""
    kind = TYPES_BY_ID.get(number)
    if kind is not None:
        return kind.name
    if number in OTHER_TYPES:
        return OTHER_TYPES[number]
    fork = " of ik_llama.cpp" if 97 <= number < 400 else ""
    return f"type {number}{fork}"

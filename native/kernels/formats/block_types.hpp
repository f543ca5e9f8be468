// The block types of GGUF: how each keeps codes and scales. Offsets in a unit are those of its
// file, times sixteen rows.
#pragma once

#include "kernels/formats/blocks.hpp"

namespace paceline {

namespace {

// Word `index` of the codes that begin at byte `at` of a row's unit.
INLINE Int code_word(const uint8_t* unit, size_t at, size_t index, int part) {
    return (Int)load_part((const float*)(unit + (at + 4 * index) * kPanel), part);
}
INLINE Reg half_float(const uint8_t* unit, size_t at, int part) {
    return Fp16::part(unit + at * kPanel, part);
}
INLINE Int header_byte(const uint8_t* unit, size_t at, int part) {
    return widen_bytes(unit + at * kPanel, part);
}
INLINE Reg to_float(Int value) { return __builtin_convertvector(value, Reg); }

// The lowest bit of each byte, those of `bits` from bit `from` on, as value `1 << to`.
INLINE Int bits_at(Int bits, int from, int to, int32_t each) {
    const int left = to - from;
    return (left >= 0 ? bits << (left >= 0 ? left : 0) : bits >> (left < 0 ? -left : 0)) &
           (each << to);
}
constexpr int32_t kBit = 0x01010101, kTwoBits = 0x03030303, kNibble = 0x0f0f0f0f;

// Adds a number to each byte; none may overflow.
INLINE Int add_bytes(Int codes, int number) { return codes + number * kBit; }

// Codes as they are, or less `kZero` with kCodeOffset added.
struct PlainCodes {
    INLINE_MEMBER Int map(Int codes) { return codes; }
};
template <int kZero>
struct OffsetCodes {
    INLINE_MEMBER Int map(Int codes) { return add_bytes(codes, kCodeOffset - kZero); }
};

// Codes that name an entry of a table; kCodeOffset is added to these.
template <class Table>
struct TableCodes {
    INLINE_MEMBER Int map(Int codes) {
#if defined(__AVX512BW__)
        const __m128i table = _mm_loadu_si128((const __m128i*)Table::kEntries);
        return (Int)_mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(-1, table), (__m512i)codes);
#elif defined(__AVX2__)
        const __m128i table = _mm_loadu_si128((const __m128i*)Table::kEntries);
        return (Int)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)codes);
#elif defined(__ARM_NEON)
        return (Int)vqtbl1q_u8(vld1q_u8(Table::kEntries), (uint8x16_t)codes);
#else
        using Bytes = uint8_t __attribute__((vector_size(kBytes)));
        Bytes bytes = (Bytes)codes;
        for (int i = 0; i < kBytes; ++i) bytes[i] = Table::kEntries[bytes[i]];
        return (Int)bytes;
#endif
    }
};
struct NonLinear {
    static constexpr uint8_t kEntries[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                             129, 141, 153, 166, 181, 197, 217, 241};
};
struct MicroFloat {
    static constexpr uint8_t kEntries[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                             128, 127, 126, 125, 124, 122, 120, 116};
};

// Sixteen bytes: low nibbles are inputs 0 to 15 of a block, high ones 16 to 31.
template <class Codes, class Use>
INLINE void nibble_block(const uint8_t* unit, size_t at, size_t block, int part, Use use) {
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
        const Int both = code_word(unit, at, q, part);
        use(block, q, Codes::map(both & kNibble));
        use(block, q + 4, Codes::map(both >> 4 & kNibble));
    }
}

// d q, or d (q - zero) or d T[q].
template <class Codes>
struct NibbleBlocks {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {{Holds::half_float, 1}, {Holds::word, 4}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        nibble_block<Codes>(unit, 2, 0, part, use);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        scale(0, 0, half_float(unit, 0, part));
    }
};
using Q4_0 = NibbleBlocks<OffsetCodes<8>>;
using Iq4Nl = NibbleBlocks<TableCodes<NonLinear>>;

// d q + m
struct Q4_1 {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = true;
    static constexpr Field kFields[] = {{Holds::half_float, 2}, {Holds::word, 4}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        nibble_block<PlainCodes>(unit, 4, 0, part, use);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        scale(0, 0, half_float(unit, 0, part));
        minimum(0, 0, half_float(unit, 2, part));
    }
};

// 2^(e - 128) T[q]
struct Mxfp4 {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {{Holds::exponent, 1}, {Holds::word, 4}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        nibble_block<TableCodes<MicroFloat>>(unit, 1, 0, part, use);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Int e = header_byte(unit, 0, part);
        const Int small = e < 2;  // denormal: 0x00200000 << e
        scale(0, 0, (Reg)((small & ((e + 1) << 21)) | (~small & ((e - 1) << 23))));
    }
};

// The same with a fifth bit from a spread word: d (q - 16), or d q + m.
template <bool kWithMinima>
struct FiveBitBlocks {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = kWithMinima;
    static constexpr size_t kHeader = kMinima ? 4 : 2;
    static constexpr Field kFields[] = {
        {Holds::half_float, kHeader / 2}, {Holds::spread, 1}, {Holds::word, 4}};
    INLINE_MEMBER Int map(Int codes) { return kMinima ? codes : OffsetCodes<16>::map(codes); }
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        const Int high = code_word(unit, kHeader, 0, part);
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            const Int both = code_word(unit, kHeader + 4, static_cast<size_t>(q), part);
            use(0, q, map((both & kNibble) | bits_at(high, q, 4, kBit)));
            use(0, q + 4, map((both >> 4 & kNibble) | bits_at(high, q + 4, 4, kBit)));
        }
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        scale(0, 0, half_float(unit, 0, part));
        if constexpr (kMinima) minimum(0, 0, half_float(unit, 2, part));
    }
};
using Q5_0 = FiveBitBlocks<false>;
using Q5_1 = FiveBitBlocks<true>;

// d q
struct Q8_0 {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {{Holds::half_float, 1}, {Holds::biased, 8}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
#pragma GCC unroll 8
        for (size_t q = 0; q < kQuads; ++q) use(0, q, code_word(unit, 2, q, part));
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        scale(0, 0, half_float(unit, 0, part));
    }
};

// Units of 256 inputs.
struct SuperBlocks {
    static constexpr size_t kInputs = 256;
    // Scales and minima of 6 bits in twelve bytes from byte 4 on; d and dmin before them.
    template <class Scale, class Minimum>
    INLINE_MEMBER void six_bit_scales(const uint8_t* unit, int part, Scale scale,
                                      Minimum minimum) {
        const Reg d = half_float(unit, 0, part), dmin = -half_float(unit, 2, part);
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; ++j) {
            const Int low = header_byte(unit, 4 + j, part), min = header_byte(unit, 8 + j, part);
            const Int both = header_byte(unit, 12 + j, part);
            scale(j, 0, d * to_float(low & 63));
            minimum(j, 0, dmin * to_float(min & 63));
            scale(j + 4, 0, d * to_float((both & 15) | (low >> 6) << 4));
            minimum(j + 4, 0, dmin * to_float(both >> 4 | (min >> 6) << 4));
        }
    }
};

// Two bits of each code: four groups of 32 inputs by shifts, from 32 bytes.
template <class Use>
INLINE void two_bit_groups(const uint8_t* unit, size_t at, int part, Use use) {
#pragma GCC unroll 2
    for (size_t half = 0; half < 2; ++half)
#pragma GCC unroll 8
        for (size_t q = 0; q < kQuads; ++q) {
            const Int four = code_word(unit, at, half * kQuads + q, part);
#pragma GCC unroll 4
            for (size_t group = 0; group < 4; ++group)
                use(half * 4 + group, q, four >> (2 * static_cast<int>(group)) & kTwoBits);
        }
}

// d (s & 15) q - dmin (s >> 4), s for each 16 inputs
struct Q2K : SuperBlocks {
    static constexpr int kScales = 2;
    static constexpr bool kMinima = true;
    static constexpr Field kFields[] = {
        {Holds::byte, 16}, {Holds::word, 16}, {Holds::half_float, 2}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        two_bit_groups(unit, 16, part, use);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        const Reg d = half_float(unit, 80, part), dmin = -half_float(unit, 82, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int both = header_byte(unit, j, part);
            scale(j / 2, j % 2, d * to_float(both & 15));
            minimum(j / 2, j % 2, dmin * to_float(both >> 4));
        }
    }
};

// d (s - 32) (q - 4), s of 6 bits for each 16 inputs
struct Q3K : SuperBlocks {
    static constexpr int kScales = 2;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {
        {Holds::word, 8}, {Holds::word, 16}, {Holds::byte, 12}, {Holds::half_float, 1}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        two_bit_groups(unit, 32, part, [&](size_t block, size_t q, Int low) INLINE_LAMBDA {
            const Int high = bits_at(code_word(unit, 0, q, part), static_cast<int>(block), 2, kBit);
            use(block, q, add_bytes(low | high, kCodeOffset - 4));
        });
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 108, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int nibbles = header_byte(unit, 96 + j % 8, part);
            const Int high = header_byte(unit, 104 + j % 4, part);
            const Int low = j < 8 ? nibbles & 15 : nibbles >> 4;
            const Int s = low | (high >> (2 * static_cast<int>(j / 4)) & 3) << 4;
            scale(j / 2, j % 2, d * to_float(s - 32));
        }
    }
};

// d s q - dmin m
struct Q4K : SuperBlocks {
    static constexpr int kScales = 1;
    static constexpr bool kMinima = true;
    static constexpr Field kFields[] = {
        {Holds::half_float, 2}, {Holds::byte, 12}, {Holds::word, 32}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
#pragma GCC unroll 4
        for (size_t pair = 0; pair < 4; ++pair)
#pragma GCC unroll 1
            for (size_t q = 0; q < kQuads; ++q) {
                const Int both = code_word(unit, 16, pair * kQuads + q, part);
                use(2 * pair, q, both & kNibble);
                use(2 * pair + 1, q, both >> 4 & kNibble);
            }
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        six_bit_scales(unit, part, scale, minimum);
    }
};

// The same with a fifth bit.
struct Q5K : SuperBlocks {
    static constexpr int kScales = 1;
    static constexpr bool kMinima = true;
    static constexpr Field kFields[] = {
        {Holds::half_float, 2}, {Holds::byte, 12}, {Holds::word, 8}, {Holds::word, 32}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
#pragma GCC unroll 1
        for (size_t q = 0; q < kQuads; ++q) {
            const Int high = code_word(unit, 16, q, part);
#pragma GCC unroll 4
            for (int pair = 0; pair < 4; ++pair) {
                const Int both =
                    code_word(unit, 48, static_cast<size_t>(pair) * kQuads + q, part);
                const auto block = static_cast<size_t>(2 * pair);
                use(block, q, (both & kNibble) | bits_at(high, 2 * pair, 4, kBit));
                use(block + 1, q, (both >> 4 & kNibble) | bits_at(high, 2 * pair + 1, 4, kBit));
            }
        }
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        six_bit_scales(unit, part, scale, minimum);
    }
};

// d s (q - 32), s for each 16 inputs
struct Q6K : SuperBlocks {
    static constexpr int kScales = 2;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {
        {Holds::word, 32}, {Holds::word, 16}, {Holds::byte, 16}, {Holds::half_float, 1}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        const auto map = [](Int low, Int high) INLINE_LAMBDA {
            return add_bytes(low | high, kCodeOffset - 32);
        };
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (size_t q = 0; q < kQuads; ++q) {
                const Int high = code_word(unit, 128, half * kQuads + q, part);
#pragma GCC unroll 2
                for (size_t i = 0; i < 2; ++i) {
                    const Int both = code_word(unit, 0, half * 16 + i * kQuads + q, part);
                    const int from = 2 * static_cast<int>(i);
                    use(half * 4 + i, q, map(both & kNibble, bits_at(high, from, 4, kTwoBits)));
                    use(half * 4 + i + 2, q,
                        map(both >> 4 & kNibble, bits_at(high, from + 4, 4, kTwoBits)));
                }
            }
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 208, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int s = header_byte(unit, 192 + j, part) << 24 >> 24;
            scale(j / 2, j % 2, d * to_float(s));
        }
    }
};

// d (s - 32) T[q], s of 6 bits
struct Iq4Xs : SuperBlocks {
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr Field kFields[] = {{Holds::half_float, 1},
                                        {Holds::half_word, 1},
                                        {Holds::byte, 4},
                                        {Holds::word, 32}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
#pragma GCC unroll 8
        for (size_t block = 0; block < 8; ++block)
            nibble_block<TableCodes<NonLinear>>(unit, 8 + 16 * block, block, part, use);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 0, part);
        const Int high = widen(((const PlainShorts*)(unit + 2 * kPanel))[part]);
#pragma GCC unroll 8
        for (size_t block = 0; block < 8; ++block) {
            const Int both = header_byte(unit, 4 + block / 2, part);
            const Int low = block % 2 ? both >> 4 : both & 15;
            const Int s = low | (high >> (2 * static_cast<int>(block)) & 3) << 4;
            scale(block, 0, d * to_float(s - 32));
        }
    }
};

// d (q - 1)
struct TernaryBlocks : SuperBlocks {
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    INLINE_MEMBER Int map(Int codes) { return add_bytes(codes, kCodeOffset - 1); }
    template <class Scale>
    INLINE_MEMBER void one_scale(const uint8_t* unit, size_t at, int part, Scale scale) {
        const Reg d = half_float(unit, at, part);
        for (size_t block = 0; block < 8; ++block) scale(block, 0, d);
    }
};

struct Tq2_0 : TernaryBlocks {
    static constexpr Field kFields[] = {{Holds::word, 16}, {Holds::half_float, 1}};
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        two_bit_groups(unit, 0, part, [&](size_t block, size_t q, Int codes) INLINE_LAMBDA {
            use(block, q, map(codes));
        });
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        one_scale(unit, 64, part, scale);
    }
};

// Five digits of base 3 in a byte: its fractions of 256, from the first on.
struct Tq1_0 : TernaryBlocks {
    static constexpr Field kFields[] = {{Holds::word, 13}, {Holds::half_float, 1}};
    using Bytes = uint8_t __attribute__((vector_size(kBytes), may_alias));

    // The digits of `count` words; number `n` of a word goes to use(n, codes).
    template <size_t kDigits, class Use>
    INLINE_MEMBER void digits(Int word, Use use) {
        Bytes rest = (Bytes)word;
#pragma GCC unroll 5
        for (size_t n = 0; n < kDigits; ++n) {
            const Bytes above = (Bytes)(rest > 85) & 1, twice = (Bytes)(rest > 170) & 1;
            use(n, map((Int)(above + twice)));
            rest = rest + rest + rest;
        }
    }
    template <class Use>
    INLINE_MEMBER void codes(const uint8_t* unit, int part, Use use) {
        for (size_t q = 0; q < kQuads; ++q)
            digits<5>(code_word(unit, 0, q, part),
                      [&](size_t n, Int codes) INLINE_LAMBDA { use(n, q, codes); });
        for (size_t q = 0; q < 4; ++q)
            digits<5>(code_word(unit, 32, q, part), [&](size_t n, Int codes) INLINE_LAMBDA {
                use(5 + n / 2, n % 2 * 4 + q, codes);
            });
        digits<4>(code_word(unit, 48, 0, part),
                  [&](size_t n, Int codes) INLINE_LAMBDA { use(7, 4 + n, codes); });
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        one_scale(unit, 52, part, scale);
    }
};

}  // namespace

}  // namespace paceline

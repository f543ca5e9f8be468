// The block types of GGUF: what their files hold, and their scales. `d` and `m` are fp16.
#pragma once

#include "kernels/formats/blocks.hpp"

namespace paceline {

namespace {

INLINE Reg half_float(const uint8_t* unit, size_t at, int part) {
    return Fp16::part(unit + at * kPanel, part);
}
INLINE Int header_byte(const uint8_t* unit, size_t at, int part) {
    return widen_bytes(unit + at * kPanel, part);
}

// Low nibbles are the first inputs, high ones those that follow.
template <size_t kCount>
INLINE void split_nibbles(const uint8_t* from, uint8_t* __restrict out) {
    using Vector = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
#pragma GCC unroll 4
    for (size_t i = 0; i < kCount; i += 16) {
        const Vector both = *(const Vector*)(from + i);
        *(Vector*)(out + i) = both & 15;
        *(Vector*)(out + kCount + i) = both >> 4;
    }
}
// Four groups of 32 inputs by shifts, from 32 bytes; twice.
INLINE void split_pairs(const uint8_t* from, uint8_t* __restrict out) {
    using Vector = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
    for (size_t k = 0; k < 256; k += 16) {
        const Vector four = *(const Vector*)(from + k / 128 * 32 + k % 32);
        *(Vector*)(out + k) = four >> static_cast<uint8_t>(k / 32 % 4 * 2) & 3;
    }
}
// Adds `1 << to` where bit k / 32 of byte k % 32 is set, for 256 inputs.
INLINE void add_bits(const uint8_t* from, int to, uint8_t* __restrict out) {
    using Vector = uint8_t __attribute__((vector_size(16), aligned(1), may_alias));
    for (size_t k = 0; k < 256; k += 16) {
        const Vector bits = *(const Vector*)(from + k % 32);
        *(Vector*)(out + k) |= (bits >> static_cast<uint8_t>(k / 32) & 1) << static_cast<uint8_t>(to);
    }
}

// One scale and no minimum: what a type with blocks of 32 inputs is, if it says no more.
struct SmallBlocks {
    static constexpr size_t kInputs = 32;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr const uint8_t* table() { return nullptr; }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        scale(0, 0, half_float(unit, 0, part));
    }
};

// d q, d and m first
struct WithMinimum : SmallBlocks {
    static constexpr bool kMinima = true;
    static constexpr Field kHeader[] = {{Holds::half_floats, 0, 2}};
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        scale(0, 0, half_float(unit, 0, part));
        minimum(0, 0, half_float(unit, 2, part));
    }
};
struct WithScale : SmallBlocks {
    static constexpr Field kHeader[] = {{Holds::half_floats, 0, 1}};
};

using TableCodes = BlockCodes<4, 0, true>;

// d T[q]
struct Iq4Nl : WithScale {
    using Codes = TableCodes;
    static constexpr size_t kFileBytes = 18;
    static constexpr uint8_t kTable[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                           129, 141, 153, 166, 181, 197, 217, 241};
    static constexpr const uint8_t* table() { return kTable; }
    static void codes(const uint8_t* unit, uint8_t* out) { split_nibbles<16>(unit + 2, out); }
};

// d (q - 8)
struct Q4_0 : Iq4Nl {
    static constexpr bool kLinear = true;
    static constexpr uint8_t kTable[16] = {120, 121, 122, 123, 124, 125, 126, 127,
                                           128, 129, 130, 131, 132, 133, 134, 135};
    static constexpr const uint8_t* table() { return kTable; }
};

// 2^(e - 128) T[q]
struct Mxfp4 : SmallBlocks {
    using Codes = TableCodes;
    static constexpr size_t kFileBytes = 17;
    static constexpr Field kHeader[] = {{Holds::exponent, 0, 1}};
    static constexpr uint8_t kTable[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                           128, 127, 126, 125, 124, 122, 120, 116};
    static constexpr const uint8_t* table() { return kTable; }
    static void codes(const uint8_t* unit, uint8_t* out) { split_nibbles<16>(unit + 1, out); }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Int e = header_byte(unit, 0, part);
        const Int small = e < 2;  // denormal: 0x00200000 << e
        scale(0, 0, (Reg)((small & ((e + 1) << 21)) | (~small & ((e - 1) << 23))));
    }
};

// d q + m
struct Q4_1 : WithMinimum {
    using Codes = BlockCodes<4, 0>;
    static constexpr size_t kFileBytes = 20;
    static void codes(const uint8_t* unit, uint8_t* out) { split_nibbles<16>(unit + 4, out); }
};

// Four bits in nibbles, behind 32 fifth ones.
INLINE void five_bits(const uint8_t* from, uint8_t* out) {
    uint32_t high;
    std::memcpy(&high, from, sizeof(high));
    split_nibbles<16>(from + 4, out);
    for (size_t k = 0; k < kBlockInputs; ++k)
        out[k] = static_cast<uint8_t>(out[k] | (high >> k & 1) << 4);
}

// d (q - 16)
struct Q5_0 : WithScale {
    using Codes = BlockCodes<5, kCodeOffset - 16>;
    static constexpr size_t kFileBytes = 22;
    static void codes(const uint8_t* unit, uint8_t* out) { five_bits(unit + 2, out); }
};

// d q + m
struct Q5_1 : WithMinimum {
    using Codes = BlockCodes<5, 0>;
    static constexpr size_t kFileBytes = 24;
    static void codes(const uint8_t* unit, uint8_t* out) { five_bits(unit + 4, out); }
};

// d q
struct Q8_0 : WithScale {
    using Codes = BlockCodes<8, 0>;
    static constexpr size_t kFileBytes = 34;
    static void codes(const uint8_t* unit, uint8_t* out) {
        for (size_t k = 0; k < kInputs; ++k) out[k] = unit[2 + k] ^ kCodeOffset;
    }
};

// Units of 256 inputs.
struct SuperBlocks {
    static constexpr size_t kInputs = 256;
    static constexpr const uint8_t* table() { return nullptr; }
};

// d (s & 15) q - dmin (s >> 4), s for each 16 inputs
struct Q2K : SuperBlocks {
    using Codes = BlockCodes<2, 0>;
    static constexpr int kScales = 2;
    static constexpr bool kMinima = true;
    static constexpr size_t kFileBytes = 84;
    static constexpr Field kHeader[] = {{Holds::half_floats, 80, 2}, {Holds::bytes, 0, 16}};
    static void codes(const uint8_t* unit, uint8_t* out) { split_pairs(unit + 16, out); }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        const Reg d = half_float(unit, 0, part), dmin = -half_float(unit, 2, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int both = header_byte(unit, 4 + j, part);
            scale(j / 2, j % 2, d * to_float(both & 15));
            minimum(j / 2, j % 2, dmin * to_float(both >> 4));
        }
    }
};

// d (s - 32) (q - 4), s of 6 bits for each 16 inputs
struct Q3K : SuperBlocks {
    using Codes = BlockCodes<3, kCodeOffset - 4>;
    static constexpr int kScales = 2;
    static constexpr bool kMinima = false;
    static constexpr size_t kFileBytes = 110;
    static constexpr Field kHeader[] = {{Holds::half_floats, 108, 1}, {Holds::bytes, 96, 12}};
    static void codes(const uint8_t* unit, uint8_t* out) {
        split_pairs(unit + 32, out);
        add_bits(unit, 2, out);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 0, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int nibbles = header_byte(unit, 2 + j % 8, part);
            const Int high = header_byte(unit, 10 + j % 4, part);
            const Int low = j < 8 ? nibbles & 15 : nibbles >> 4;
            const Int s = low | (high >> (2 * static_cast<int>(j / 4)) & 3) << 4;
            scale(j / 2, j % 2, d * to_float(s - 32));
        }
    }
};

// d s q - dmin m, s and m of 6 bits in twelve bytes
struct Q4K : SuperBlocks {
    using Codes = BlockCodes<4, 0>;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = true;
    static constexpr size_t kFileBytes = 144;
    static constexpr Field kHeader[] = {{Holds::half_floats, 0, 2}, {Holds::bytes, 4, 12}};
    static void codes(const uint8_t* unit, uint8_t* out) {
        for (size_t i = 0; i < 4; ++i) split_nibbles<32>(unit + 16 + 32 * i, out + 64 * i);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        const Reg d = half_float(unit, 0, part), dmin = -half_float(unit, 2, part);
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

// The same with a fifth bit.
struct Q5K : Q4K {
    using Codes = BlockCodes<5, 0>;
    static constexpr size_t kFileBytes = 176;
    static void codes(const uint8_t* unit, uint8_t* out) {
        for (size_t i = 0; i < 4; ++i) split_nibbles<32>(unit + 48 + 32 * i, out + 64 * i);
        add_bits(unit + 16, 4, out);
    }
};

// d s (q - 32), s for each 16 inputs
struct Q6K : SuperBlocks {
    using Codes = BlockCodes<6, kCodeOffset - 32>;
    static constexpr int kScales = 2;
    static constexpr bool kMinima = false;
    static constexpr size_t kFileBytes = 210;
    static constexpr Field kHeader[] = {{Holds::half_floats, 208, 1}, {Holds::bytes, 192, 16}};
    static void codes(const uint8_t* unit, uint8_t* out) {
        uint8_t high[kInputs];
        split_pairs(unit + 128, high);
        for (size_t half = 0; half < 2; ++half)
            split_nibbles<64>(unit + 64 * half, out + 128 * half);
        for (size_t k = 0; k < kInputs; ++k)
            out[k] = static_cast<uint8_t>(out[k] | high[k] << 4);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 0, part);
        for (size_t j = 0; j < 16; ++j) {
            const Int s = header_byte(unit, 2 + j, part) << 24 >> 24;
            scale(j / 2, j % 2, d * to_float(s));
        }
    }
};

// d (s - 32) T[q], s of 6 bits
struct Iq4Xs : SuperBlocks {
    using Codes = TableCodes;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr size_t kFileBytes = 136;
    static constexpr Field kHeader[] = {
        {Holds::half_floats, 0, 1}, {Holds::half_words, 2, 1}, {Holds::bytes, 4, 4}};
    static constexpr const uint8_t* table() { return Iq4Nl::kTable; }
    static void codes(const uint8_t* unit, uint8_t* out) {
        for (size_t i = 0; i < 8; ++i) split_nibbles<16>(unit + 8 + 16 * i, out + 32 * i);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 0, part);
        const Int high = widen(((const PlainShorts*)(unit + 2 * kPanel))[part]);
        for (size_t block = 0; block < 8; ++block) {
            const Int both = header_byte(unit, 4 + block / 2, part);
            const Int low = block % 2 ? both >> 4 : both & 15;
            const Int s = low | (high >> (2 * static_cast<int>(block)) & 3) << 4;
            scale(block, 0, d * to_float(s - 32));
        }
    }
};

// d (q - 1)
struct Tq2_0 : SuperBlocks {
    using Codes = BlockCodes<2, kCodeOffset - 1>;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = false;
    static constexpr size_t kFileBytes = 66;
    static constexpr Field kHeader[] = {{Holds::half_floats, 64, 1}};
    static void codes(const uint8_t* unit, uint8_t* out) { split_pairs(unit, out); }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum) {
        const Reg d = half_float(unit, 0, part);
        for (size_t block = 0; block < 8; ++block) scale(block, 0, d);
    }
};

// The same, five digits of base 3 in a byte: its fraction of 256, the first digit at the front.
struct Tq1_0 : Tq2_0 {
    static constexpr size_t kFileBytes = 54, kPacked = 13;
    static constexpr Field kHeader[] = {{Holds::half_floats, 52, 1}};
    using Bytes = uint8_t __attribute__((vector_size(kBytes), may_alias));

    // Bytes 0 to 31 hold five digits of 32 inputs, the next 16 of 16, and the last 4 four of 4.
    static void expand(const uint8_t* words, uint8_t* planes) {
        std::memset(planes, 0, 8 * Codes::kBlockBytes);
        for (size_t word = 0; word < kPacked; ++word) {
            const size_t bytes = word < 8 ? 32 : word < 12 ? 16 : 4;
            const size_t start = word < 8 ? 0 : word < 12 ? 160 : 240;
            const size_t first = start / 4 + (word < 8 ? word : word < 12 ? word - 8 : 0);
            for (size_t digit = 0; digit < (word < 12 ? 5 : 4); ++digit)
                for (int part = 0; part < kParts; ++part)
                    put(words + word * kWordBytes, digit, first + digit * bytes / 4, part, planes);
        }
    }

    static void put(const uint8_t* word, size_t digit, size_t quad, int part, uint8_t* planes) {
        Bytes rest = (Bytes)Codes::word(word, 0, part);
        for (; digit > 0; --digit) rest = rest + rest + rest;
        const Bytes codes = ((Bytes)(rest > 85) & 1) + ((Bytes)(rest > 170) & 1);
        auto* to = (float*)(planes + quad / 4 * kWordBytes);  // a word holds four quads
        const Int others = (Int)load_part(to, part);
        store_part(to, part, (Reg)(others | (Int)codes << splat_word(2 * (quad % 4))));
    }
};

}  // namespace

}  // namespace paceline

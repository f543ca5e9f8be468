// Codes of a block of 32 inputs: planes of bits, each in the words of sixteen rows side by side.
//
// A word holds eight quads of one bit, four of two bits, two of four bits or one of eight; the bits
// of input 4q + i lie in byte i. A block has its one-bit plane first, then of each half (16 inputs)
// the four-bit plane and the two-bit plane, or the bytes.
#pragma once

#include "kernels/formats/block_products.hpp"

namespace paceline {

namespace {

constexpr int32_t kBit = 0x01010101, kTwoBits = 0x03030303, kNibble = 0x0f0f0f0f;

INLINE Reg to_float(Int value) { return __builtin_convertvector(value, Reg); }

// The lowest bits of each byte that `mask` has, those of `bits` from bit `from` on, moved to `to`.
INLINE Int move_bits(Int bits, int from, int to, int32_t mask) {
    const int left = to - from;
    return (left >= 0 ? bits << (left >= 0 ? left : 0) : bits >> (left < 0 ? -left : 0)) &
           (mask << to);
}

// Entries of a table that the bytes of `codes` name, 0 to 15.
INLINE Int look_up(const uint8_t* table, Int codes) {
#if defined(__AVX512BW__)
    const __m128i entries = _mm_loadu_si128((const __m128i*)table);
    return (Int)_mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(-1, entries), (__m512i)codes);
#elif defined(__AVX2__)
    const __m128i entries = _mm_loadu_si128((const __m128i*)table);
    return (Int)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), (__m256i)codes);
#elif defined(PACELINE_NEON)
    return (Int)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)codes);
#else
    using Bytes = uint8_t __attribute__((vector_size(kBytes)));
    Bytes bytes = (Bytes)codes;
    for (int i = 0; i < kBytes; ++i) bytes[i] = table[bytes[i]];
    return (Int)bytes;
#endif
}

// Codes of kBits bits; kAdd is added to each. With kTable, 4-bit codes name entries of a table.
template <int kBits, int kAdd, bool kTable = false>
struct BlockCodes {
    static constexpr bool kFour = kBits >= 4 && kBits <= 6, kEight = kBits == 8;
    static constexpr bool kTwo = kBits == 2 || kBits == 3 || kBits == 6;
    static constexpr bool kOne = kBits == 3 || kBits == 5;
    static constexpr size_t kHalfWords = kEight ? 4 : (kFour ? 2 : 0) + (kTwo ? 1 : 0);
    static constexpr size_t kWords = kOne + 2 * kHalfWords;
    static constexpr size_t kBlockBytes = kWords * kWordBytes;

    static Int word(const uint8_t* block, size_t index, int part) {
        return (Int)load_part((const float*)(block + index * kWordBytes), part);
    }

    INLINE_MEMBER Int quad(const uint8_t* block, size_t half, int q, int part,
                           const uint8_t* table) {
        const uint8_t* from = block + (kOne + half * kHalfWords) * kWordBytes;
        if constexpr (kEight) return word(from, static_cast<size_t>(q), part);
        Int codes = {};
        if constexpr (kFour) {
            const Int both = word(from, static_cast<size_t>(q / 2), part);
            codes = (q % 2 ? both >> 4 : both) & kNibble;
        }
        constexpr int kAt = kFour ? 4 : 0;
        if constexpr (kTwo)
            codes |= move_bits(word(from, kFour ? 2 : 0, part), 2 * q, kAt, kTwoBits);
        if constexpr (kOne) {
            const Int bits = word(block, 0, part) >> splat_word(static_cast<int32_t>(4 * half));
            codes |= move_bits(bits, q, kAt + (kTwo ? 2 : 0), kBit);
        }
        if constexpr (kTable) return look_up(table, codes);
        return kAdd ? codes + kAdd * kBit : codes;
    }

    // Writes the codes of one row, bytes of up to kBits bits, as the words of its planes.
    static void pack(const uint8_t* codes, uint32_t* words) {
        uint32_t quads[8];
        std::memcpy(quads, codes, sizeof(quads));
        if constexpr (kEight) {
            std::memcpy(words, quads, sizeof(quads));
            return;
        }
        constexpr int kAt = kFour ? 4 : 0;
        if constexpr (kOne) {
            uint32_t bits = 0;
            for (int q = 0; q < 8; ++q)
                bits |= (quads[q] >> (kAt + (kTwo ? 2 : 0)) & kBit) << q;
            *words++ = bits;
        }
        for (int half = 0; half < 2; ++half) {
            const uint32_t* from = quads + 4 * half;
            if constexpr (kFour)
                for (int i = 0; i < 4; i += 2)
                    *words++ = (from[i] & kNibble) | (from[i + 1] & kNibble) << 4;
            if constexpr (kTwo) {
                uint32_t pairs = 0;
                for (int q = 0; q < 4; ++q) pairs |= (from[q] >> kAt & kTwoBits) << (2 * q);
                *words++ = pairs;
            }
        }
    }
};

}  // namespace

}  // namespace paceline

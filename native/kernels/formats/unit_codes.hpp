// Codes of 2 to 8 bits in rows: 64 inputs at a time ("unit"), in planes of bits.
//
// Of a unit's four sixteens of inputs, the plane of four bits has two bytes of sixteen: of the first
// sixteen in the low half and of the second in the high one, then of the others. The plane of two bits
// has sixteen bytes, two bits of each sixteen from the lowest up. The plane of one bit has a bit for
// each input. A width has the planes that add up to it, the widest first, which are its lowest bits:
// one of four, one of two and up to two of one.
#pragma once

#include "kernels/formats/floats.hpp"

namespace paceline {

namespace {

constexpr size_t kUnitInputs = 64, kSixteens = kUnitInputs / kPanel;

INLINE size_t units_of(size_t inputs) { return (inputs + kUnitInputs - 1) / kUnitInputs; }

template <int kBits>
struct UnitCodes {
    static constexpr bool kFour = kBits >= 4, kTwo = kBits % 4 >= 2 || kBits == 8;
    static constexpr int kWide = (kFour ? 4 : 0) + (kTwo ? 2 : 0), kOnes = kBits - kWide;
    static constexpr size_t kBytes = kUnitInputs / 8 * kBits;
    static constexpr int kEntries = 1 << kBits;

    // Sixteen codes of a unit, part `part` of a register of words.
    INLINE_MEMBER Int get(const uint8_t* unit, int sixteen, int part) {
        Int codes = {};
        if constexpr (kFour) {
            codes = widen_bytes(unit + sixteen / 2 * static_cast<int>(kPanel), part);
            codes = (sixteen % 2 ? codes >> 4 : codes) & 15;
            unit += 2 * kPanel;
        }
        if constexpr (kTwo) {
            codes |= (widen_bytes(unit, part) >> (2 * sixteen) & 3) << (kFour ? 4 : 0);
            unit += kPanel;
        }
        for (int one = 0; one < kOnes; ++one, unit += kUnitInputs / 8) {
            uint16_t bits;
            std::memcpy(&bits, unit + 2 * sixteen, sizeof(bits));
            const Int lane = lane_bits(part);
            const Int all = static_cast<int32_t>(bits) - Int{};
            codes |= (Int)((all & lane) == lane) & 1 << (kWide + one);
        }
        return codes;
    }
    INLINE_MEMBER Int lane_bits(int part) {
        static const int32_t bits[kPanel] = {1,      1 << 1, 1 << 2,  1 << 3,  1 << 4,  1 << 5,
                                             1 << 6, 1 << 7, 1 << 8,  1 << 9,  1 << 10, 1 << 11,
                                             1 << 12, 1 << 13, 1 << 14, 1 << 15};
        return (Int)load_part((const float*)bits, part);
    }
};

// All codes of a unit as bytes, part `part` of kParts.
template <int kBits>
struct UnitBytes {
    static_assert(kBits <= 4);
    INLINE_MEMBER Int get(const uint8_t* unit, int part) {
        if constexpr (kBits == 4) return nibbles(unit, part);
        Int codes = pairs(unit, part);
        if constexpr (kBits == 3) codes |= bits(unit + kPanel, part);
        return codes;
    }

private:
#if defined(__AVX512BW__)
    INLINE_MEMBER Int nibbles(const uint8_t* unit, int) {
        const __m512i both = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)unit));
        const __m512i twice = _mm512_maskz_permutexvar_epi64(
            -1, _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), both);
        const __m512i by = _mm512_setr_epi64(0, 0, kByFour, kByFour, 0, 0, kByFour, kByFour);
        return (Int)_mm512_maskz_srlv_epi32(-1, twice, by) & 0x0f0f0f0f;
    }
    INLINE_MEMBER Int pairs(const uint8_t* unit, int) {
        const __m512i all =
            _mm512_maskz_broadcast_i32x4(-1, _mm_loadu_si128((const __m128i*)unit));
        const __m512i by = _mm512_setr_epi64(0, 0, 2 * kByOne, 2 * kByOne, 4 * kByOne, 4 * kByOne,
                                             6 * kByOne, 6 * kByOne);
        return (Int)_mm512_maskz_srlv_epi32(-1, all, by) & 0x03030303;
    }
    INLINE_MEMBER Int bits(const uint8_t* plane, int) {
        uint64_t mask;
        std::memcpy(&mask, plane, sizeof(mask));
        return (Int)_mm512_maskz_set1_epi8(mask, 4);
    }
#elif defined(__AVX2__)
    INLINE_MEMBER Int nibbles(const uint8_t* unit, int part) {
        const __m256i twice =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)unit + part));
        const __m256i by = _mm256_setr_epi64x(0, 0, kByFour, kByFour);
        return (Int)_mm256_srlv_epi32(twice, by) & 0x0f0f0f0f;
    }
    INLINE_MEMBER Int pairs(const uint8_t* unit, int part) {
        const __m256i all = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)unit));
        const int64_t low = 4 * part * kByOne, high = low + 2 * kByOne;
        return (Int)_mm256_srlv_epi32(all, _mm256_setr_epi64x(low, low, high, high)) & 0x03030303;
    }
    INLINE_MEMBER Int bits(const uint8_t* plane, int part) {
        int32_t mask;
        std::memcpy(&mask, plane + 4 * part, sizeof(mask));
        const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                                  0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(mask), places);
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        return (Int)set & 0x04040404;
    }
#else
    INLINE_MEMBER Int nibbles(const uint8_t* unit, int part) {
        const Int both = (Int)load_part((const float*)(unit + part / 2 * 16), 0);
        return (part % 2 ? both >> 4 : both) & 0x0f0f0f0f;
    }
    INLINE_MEMBER Int pairs(const uint8_t* unit, int part) {
        return (Int)load_part((const float*)unit, 0) >> (2 * part) & 0x03030303;
    }
    INLINE_MEMBER Int bits(const uint8_t* plane, int part) {
        using Bytes = uint8_t __attribute__((vector_size(kBytes), may_alias));
        Bytes bytes = {};
        for (int i = 0; i < kBytes; ++i)
            bytes[i] = static_cast<uint8_t>((plane[2 * part + i / 8] >> i % 8 & 1) << 2);
        return (Int)bytes;
    }
#endif
    // Four bits, or one, in both words of eight bytes.
    static constexpr int64_t kByFour = 0x0000000400000004, kByOne = 0x0000000100000001;
};

}  // namespace

}  // namespace paceline

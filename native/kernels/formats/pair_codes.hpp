// Integers of which every four neighbours of a row ("quad") have two at most that are not zero.
//
// Of each quad two are kept, with three bits that say which. A block of 32 inputs has for each of
// sixteen rows the bits of its eight quads: the low 16 of a row, side by side, then the high 8. Then
// come the kept numbers, signed, of 8 or 4 bits: sixteen bytes hold those of four rows in two quads.
// A register of them becomes the quads of its rows by one shuffle of bytes.
#pragma once

#include "kernels/formats/grouped.hpp"

namespace paceline {

namespace {

constexpr size_t kQuads = kBlockInputs / 4;  // of a row in a block
constexpr int kPatternBits = 3;
constexpr size_t kPatternBytes = kPanel * kQuads * kPatternBits / 8;

// The places of the kept numbers in a quad, for each pattern; the last two are not used.
constexpr uint8_t kPlaces[8][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}, {2, 3}, {2, 3}};

// Shuffles of the bytes of a quad: which kept number comes at each place, or none (kNothing).
constexpr uint32_t kNothing = 0x80;
struct Shuffles {
    alignas(64) uint32_t of[16];  // twice: one instruction reads four bits
};
constexpr Shuffles make_shuffles() {
    Shuffles shuffles{};
    for (int pattern = 0; pattern < 16; ++pattern)
        for (int place = 0; place < 4; ++place) {
            const uint8_t* places = kPlaces[pattern % 8];
            const uint32_t kept = place == places[0] ? 0 : place == places[1] ? 1 : kNothing;
            shuffles.of[pattern] |= kept << (8 * place);
        }
    return shuffles;
}
constexpr Shuffles kShuffles = make_shuffles();

// Where the kept numbers of a row lie among those of four rows, in the first and in the second quad.
struct RowPlaces {
    alignas(64) uint32_t of[2][kPanel];
};
constexpr RowPlaces make_row_places() {
    RowPlaces places{};
    for (uint32_t odd = 0; odd < 2; ++odd)
        for (uint32_t row = 0; row < kPanel; ++row)
            places.of[odd][row] = (8 * odd + row % 4 * 2) * 0x01010101u;
    return places;
}
constexpr RowPlaces kRowPlaces = make_row_places();

// The shuffle of each row's quad, whose pattern is in the lowest three bits; others are not read.
INLINE Int shuffles_of(Int patterns) {
#if defined(__AVX512F__)
    return (Int)_mm512_maskz_permutexvar_epi32(-1, (__m512i)patterns,
                                               _mm512_load_si512(kShuffles.of));
#elif defined(__AVX2__)
    return (Int)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)kShuffles.of),
                                            (__m256i)patterns);
#elif defined(PACELINE_NEON)
    const uint8x16x2_t table = {{vld1q_u8((const uint8_t*)kShuffles.of),
                                 vld1q_u8((const uint8_t*)kShuffles.of + 16)}};
    const Int bytes = (patterns & 7) * 0x04040404 + 0x03020100;
    return (Int)vqtbl2q_u8(table, (uint8x16_t)bytes);
#else
    for (int lane = 0; lane < kRegLanes; ++lane)
        patterns[lane] = static_cast<int32_t>(kShuffles.of[patterns[lane] & 7]);
    return patterns;
#endif
}

// The bytes that each byte of `places` names among the sixteen around it; 0 where it names none.
INLINE Int shuffle_bytes(Int bytes, Int places) {
#if defined(__AVX512BW__)
    return (Int)_mm512_shuffle_epi8((__m512i)bytes, (__m512i)places);
#elif defined(__AVX2__)
    return (Int)_mm256_shuffle_epi8((__m256i)bytes, (__m256i)places);
#elif defined(PACELINE_NEON)
    return (Int)vqtbl1q_u8((uint8x16_t)bytes, (uint8x16_t)places);
#else
    using Bytes = uint8_t __attribute__((vector_size(kBytes)));
    const Bytes from = (Bytes)bytes;
    Bytes to = (Bytes)places;
    for (int i = 0; i < kBytes; ++i) to[i] = to[i] & kNothing ? 0 : from[i / 16 * 16 + to[i] % 16];
    return (Int)to;
#endif
}

// As BlockCodes: what is not kept is half the range, as zero is.
template <int kWidth>
struct PairCodes {
    static_assert(kWidth == 8 || kWidth == 4);
    static constexpr bool kEight = false;
    static constexpr int kBits = kWidth, kHalf = 1 << (kBits - 1);
    static constexpr size_t kBlockBytes = kPatternBytes + kPanel * kBlockInputs / 2 * kBits / 8;
    static constexpr size_t kWords = (kBlockBytes + kWordBytes - 1) / kWordBytes;

    INLINE_MEMBER Int quad(const uint8_t* block, size_t half, int q, int part, const uint8_t*) {
        const auto bit = static_cast<int32_t>(kPatternBits * kHalfQuads * half);
        const Int patterns = patterns_of(block, part) >> splat_word(bit) >> kPatternBits * q;
        const Int rows = word((const uint8_t*)kRowPlaces.of[q % 2], part);
        const uint8_t* kept = block + kPatternBytes;
        Int bytes;
        if constexpr (kBits == 8) {
            bytes = word(kept + (2 * half + static_cast<size_t>(q) / 2) * kWordBytes, part);
        } else {
            const Int both = word(kept + half * kWordBytes, part);
            bytes = (q / 2 ? both >> 4 : both) & kNibble;
        }
        return shuffle_bytes(bytes, shuffles_of(patterns) + rows) ^
               static_cast<int32_t>(uint32_t{kHalf} * kBit);
    }

    // Writes 32 codes of one row; two of every four are half the range.
    static void put(uint8_t* block, size_t row, const uint8_t* codes) {
        uint32_t patterns = 0;
        for (size_t quad = 0; quad < kQuads; ++quad) {
            const uint32_t pattern = pattern_of(codes + 4 * quad);
            patterns |= pattern << (kPatternBits * quad);
            for (size_t i = 0; i < 2; ++i)
                put_kept(block, row, quad, i, codes[4 * quad + kPlaces[pattern][i]] ^ kHalf);
        }
        put_patterns(block, row, patterns);
    }

    static void get(const uint8_t* block, size_t row, uint8_t* codes) {
        const uint32_t patterns = patterns_at(block, row);
        for (size_t quad = 0; quad < kQuads; ++quad) {
            const uint32_t pattern = patterns >> (kPatternBits * quad) & 7;
            for (size_t k = 0; k < 4; ++k) codes[4 * quad + k] = kHalf;
            for (size_t i = 0; i < 2; ++i)
                codes[4 * quad + kPlaces[pattern][i]] =
                    static_cast<uint8_t>(kept_at(block, row, quad, i) ^ kHalf);
        }
    }

    static bool fits(const uint8_t* codes, int zero) {
        int kept = 0;
        for (size_t k = 0; k < 4; ++k) kept += codes[k] != zero;
        return kept <= 2;
    }

private:
    static Int word(const uint8_t* from, int part) {
        return (Int)load_part((const float*)from, part);
    }
    INLINE_MEMBER Int patterns_of(const uint8_t* block, int part) {
        const Int low = widen(((const PlainShorts*)block)[part]);
        return low | widen_bytes(block + 2 * kPanel, part) << 16;
    }

    static uint32_t pattern_of(const uint8_t* codes) {
        for (uint32_t pattern = 0; pattern < 5; ++pattern) {
            bool holds = true;
            for (size_t k = 0; k < 4; ++k)
                holds = holds && (codes[k] == kHalf || k == kPlaces[pattern][0] ||
                                  k == kPlaces[pattern][1]);
            if (holds) return pattern;
        }
        return 5;
    }
    static void put_patterns(uint8_t* block, size_t row, uint32_t patterns) {
        const auto low = static_cast<uint16_t>(patterns);
        std::memcpy(block + 2 * row, &low, sizeof(low));
        block[2 * kPanel + row] = static_cast<uint8_t>(patterns >> 16);
    }
    static uint32_t patterns_at(const uint8_t* block, size_t row) {
        uint16_t low;
        std::memcpy(&low, block + 2 * row, sizeof(low));
        return low | static_cast<uint32_t>(block[2 * kPanel + row]) << 16;
    }

    // Where kept number `i` of a quad lies, and by how many bits it is shifted there.
    static size_t place_of(size_t row, size_t quad, size_t i) {
        const size_t among = row / 4 * 16 + quad % 2 * 8 + row % 4 * 2 + i;
        return kPatternBytes + quad / (kBits == 8 ? 2 : 4) * kWordBytes + among;
    }
    static int shift_of(size_t quad) { return kBits == 4 && quad / 2 % 2 ? 4 : 0; }
    static void put_kept(uint8_t* block, size_t row, size_t quad, size_t i, int kept) {
        uint8_t& byte = block[place_of(row, quad, i)];
        const int mask = ((1 << kBits) - 1) << shift_of(quad);
        byte = static_cast<uint8_t>((byte & ~mask) | kept << shift_of(quad));
    }
    static int kept_at(const uint8_t* block, size_t row, size_t quad, size_t i) {
        return block[place_of(row, quad, i)] >> shift_of(quad) & ((1 << kBits) - 1);
    }
};

// The quads of any decoder as `kByteMath` wants them.
template <int kWidth, bool kNibbles>
struct ByteCodes<PairCodes<kWidth>, true, kNibbles> {
    static constexpr int kBits = kByteMath == ByteMath::any ? 8 : kWidth, kOffset = 0;
    INLINE_MEMBER Int quad(const uint8_t* block, size_t q, int part, const uint8_t*) {
        return PairCodes<kWidth>::quad(block, q / kHalfQuads, static_cast<int>(q % kHalfQuads),
                                       part, nullptr);
    }
};

}  // namespace

}  // namespace paceline

// Keys and values of one head as the cache keeps them, in blocks of 64 positions.
//
// A block holds keys [64 / 16][D][16], so that scores are products like any other, then values
// [D / 16][64][16]; in int8 also a scale for each position's key and value. Rows are rounded once,
// when they are put there, and only ever read from there: a node sees its own and its ancestors'
// rows as every later token will.
#pragma once

#include "kernels/formats/floats.hpp"

namespace paceline {

namespace {

// Whole numbers from -127 to 127, as floats; the scale of a position is applied elsewhere.
struct Bytes {
    using Stored = int8_t;
    static constexpr size_t kTogether = 1;
    static Reg read(const uint8_t* from, int part, size_t) {
        const uint8_t* at = from + part * kRegLanes;
#if defined(__AVX512F__)
        const __m128i bytes = _mm_loadu_si128((const __m128i*)at);
        return (Reg)_mm512_maskz_cvtepi32_ps(-1, _mm512_maskz_cvtepi8_epi32(-1, bytes));
#elif defined(__AVX2__)
        return (Reg)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
#else
        using Few = int8_t __attribute__((vector_size(kRegLanes), aligned(1), may_alias));
        return __builtin_convertvector(*(const Few*)at, Reg);
#endif
    }
    static int8_t to(float value) {
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        return static_cast<int8_t>((value + magic) - magic);
    }
};

template <class Number>
struct Block {
    using Stored = typename Number::Stored;
    static constexpr bool kScaled = sizeof(Stored) == 1;
    static constexpr size_t kStep = kPanel * sizeof(Stored);

    static size_t values_at(size_t dim) { return kCacheBlock * dim * sizeof(Stored); }
    static size_t scales_at(size_t dim) {
        return values_at(dim) + kCacheBlock * padded(dim) * sizeof(Stored);
    }
    static size_t bytes(size_t dim) {
        return scales_at(dim) + (kScaled ? 2 * kCacheBlock * sizeof(float) : 0);
    }
    static const float* key_scales(const uint8_t* block, size_t dim) {
        return (const float*)(block + scales_at(dim));
    }
    static const float* value_scales(const uint8_t* block, size_t dim) {
        return key_scales(block, dim) + kCacheBlock;
    }
    static Stored* key(const uint8_t* block, size_t place, size_t dim) {
        return (Stored*)block + place / kPanel * dim * kPanel + place % kPanel;  // every 16th
    }
    static Stored* value(const uint8_t* block, size_t place, size_t dim) {
        return (Stored*)(block + values_at(dim)) + place * kPanel;  // runs of 16
    }

    // What a row is divided by before it is rounded.
    static float scale(const float* row, size_t dim) {
        float most = 0.0f;
        for (size_t d = 0; d < dim; ++d) {
            const float size = __builtin_fabsf(row[d]);
            most = size > most ? size : most;
        }
        return most > 1e-30f ? most / 127.0f : 0.0f;
    }

    static void put(uint8_t* block, size_t place, size_t dim, const float* key_row,
                    const float* value_row) {
        float by_key = 1.0f, by_value = 1.0f;
        if constexpr (kScaled) {
            float* scales = (float*)(block + scales_at(dim)) + place;
            scales[0] = scale(key_row, dim);
            scales[kCacheBlock] = scale(value_row, dim);
            by_key = scales[0] > 0.0f ? 1.0f / scales[0] : 0.0f;
            by_value = scales[kCacheBlock] > 0.0f ? 1.0f / scales[kCacheBlock] : 0.0f;
        }
        Stored* keys = key(block, place, dim);
        for (size_t d = 0; d < dim; ++d) keys[d * kPanel] = Number::to(key_row[d] * by_key);
        Stored* values = value(block, place, dim);
        for (size_t d = 0; d < padded(dim); ++d)
            values[d / kPanel * kCacheBlock * kPanel + d % kPanel] =
                d < dim ? Number::to(value_row[d] * by_value) : Stored{};
    }

    // `count` places that follow each other in one panel, in both blocks.
    static void copy(const uint8_t* from, size_t from_place, uint8_t* to, size_t to_place,
                     size_t count, size_t dim) {
        const Stored* key_from = key(from, from_place, dim);
        Stored* key_to = key(to, to_place, dim);
        if (count == kPanel)
            std::memcpy(key_to, key_from, dim * kStep);
        else
            for (size_t d = 0; d < dim; ++d)
                for (size_t i = 0; i < count; ++i)
                    key_to[d * kPanel + i] = key_from[d * kPanel + i];
        const Stored* value_from = value(from, from_place, dim);
        Stored* value_to = value(to, to_place, dim);
        for (size_t d = 0; d < padded(dim); d += kPanel)
            std::memcpy(value_to + d * kCacheBlock, value_from + d * kCacheBlock, count * kStep);
        if constexpr (kScaled) {
            const float* scale_from = key_scales(from, dim) + from_place;
            float* scale_to = (float*)(to + scales_at(dim)) + to_place;
            for (size_t i = 0; i < count; ++i) {
                scale_to[i] = scale_from[i];
                scale_to[kCacheBlock + i] = scale_from[kCacheBlock + i];
            }
        }
    }
};

}  // namespace

}  // namespace paceline

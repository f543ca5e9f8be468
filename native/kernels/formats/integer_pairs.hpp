// Products of int16 activations and integer weights: how both are laid out, two inputs at a time.
//
// A token's row becomes int16 numbers with one scale. They come in blocks of 32 inputs, in pairs of
// neighbours, as the instructions that multiply pairs want them. Sums of products are exact.
#pragma once

#include "kernels/formats/floats.hpp"

namespace paceline {

namespace {

constexpr size_t kPairs = kBlockInputs / 2;
constexpr float kMaxActivation = 32767.0f;

// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in lane i.
INLINE Int add_pairs(Int sum, Shorts a, Shorts b) {
#if defined(PACELINE_VNNI)
    return dot_pairs(sum, (Int)a, (Int)b);
#elif defined(__AVX512BW__)
    return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(PACELINE_NEON)
    const int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    const int32x4_t high = vmull_high_s16((int16x8_t)a, (int16x8_t)b);
    return sum + (Int)vpaddq_s32(low, high);
#elif defined(__SSE2__)
    return sum + (Int)__builtin_ia32_pmaddwd128(
                     (short __attribute__((vector_size(16))))a,
                     (short __attribute__((vector_size(16))))b);
#else
    for (int lane = 0; lane < kRegLanes; ++lane)
        sum[lane] += a[2 * lane] * b[2 * lane] + a[2 * lane + 1] * b[2 * lane + 1];
    return sum;
#endif
}

INLINE size_t blocks_of(size_t inputs) { return (inputs + kBlockInputs - 1) / kBlockInputs; }

INLINE int32_t as_pair(int32_t low, int32_t high) {
    return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffff) |
                                static_cast<uint32_t>(high) << 16);
}

static float largest_size(const float* row, size_t inputs) {
    F16 sizes = splat(0.0f);
    for (size_t k = 0; k < inputs; k += kPanel) {  // padding is zero
        const F16 value = load(row + k);
        sizes = max(sizes, max(value, splat(0.0f) - value));
    }
    return largest(sizes);
}

// The numbers of one block of a row, in the order of the places; behind the last input, zeros.
static void round_block(const float* row, size_t inputs, const int32_t* order, size_t block,
                        float inverse, int32_t* numbers) {
    alignas(64) float gathered[kBlockInputs];
    const size_t first = block * kBlockInputs;
    const size_t count = inputs - first < kBlockInputs ? inputs - first : kBlockInputs;
    const float* values = row + first;
    if (order || count < kBlockInputs) {
        for (size_t k = 0; k < kBlockInputs; ++k)
            gathered[k] = k < count
                              ? row[order ? static_cast<size_t>(order[first + k]) : first + k]
                              : 0.0f;
        values = gathered;
    }
    const F16 magic = splat(12582912.0f);  // adding it rounds to an integer
    for (size_t k = 0; k < kBlockInputs; k += kPanel) {
        const F16 rounded = (load(values + k) * splat(inverse) + magic) - magic;
        for (int i = 0; i < kParts; ++i)
            *(Int*)(numbers + k + i * kRegLanes) = __builtin_convertvector(rounded.part[i], Int);
    }
}

// Rows are arranged as their scales, [padded(n)], then tiles of [blocks][kSpan][width] words. A
// layout says kSpan, kMaxTokens and `arrange_block(numbers, words, width)`.
template <class Layout>
static size_t arranged_pair_bytes(size_t n, size_t inputs) {
    const size_t words = room(tiling(n, Layout::kMaxTokens)) * blocks_of(inputs) * Layout::kSpan;
    return (padded(n) + words) * sizeof(int32_t);
}

// Part `part` of `parts` takes its share of the tiles or, where there are few, of the blocks; then
// each computes the rows' scales itself.
template <class Layout>
static void arrange_pairs(const float* rows, size_t stride, size_t n, size_t inputs,
                          const int32_t* order, void* out, size_t part, size_t parts) {
    constexpr size_t kSpan = Layout::kSpan;
    const Tiling tiles = tiling(n, Layout::kMaxTokens);
    const size_t all = blocks_of(inputs);
    const bool whole = tiles.count >= parts;
    const size_t begin = whole ? 0 : all * part / parts;
    const size_t end = whole ? all : all * (part + 1) / parts;
    const size_t first_tile = whole ? tiles.count * part / parts : 0;
    const size_t last_tile = whole ? tiles.count * (part + 1) / parts : tiles.count;
    alignas(64) int32_t numbers[kBlockInputs];
    float* scales = static_cast<float*>(out);
    for (size_t tile = first_tile; tile < last_tile; ++tile) {
        const size_t first = tile * tiles.width, tokens = tiles.tokens(tile);
        const size_t width = tiles.width_of(tile);
        int32_t* words = static_cast<int32_t*>(out) + padded(n) + first * all * kSpan;
        for (size_t t = 0; t < width; ++t) {
            if (t >= tokens) {
                for (size_t i = begin * kSpan; i < end * kSpan; ++i) words[i * width + t] = 0;
                continue;
            }
            const float* row = rows + (first + t) * stride;
            const float size = largest_size(row, inputs);
            if (begin == 0) scales[first + t] = size / kMaxActivation;
            const float inverse = size > 0.0f ? kMaxActivation / size : 0.0f;
            for (size_t block = begin; block < end; ++block) {
                round_block(row, inputs, order, block, inverse, numbers);
                Layout::arrange_block(numbers, words + block * kSpan * width + t, width);
            }
        }
    }
}

// What formats share that keep weights as integers. `Stored` says how:
//   kAtOnce         pairs of sixteen rows that come with one read
//   kLead           words of a token before the pairs of a block, 0 or 1: `lead(sum)` of its values
//   kEach           registers for each sum: 2 if blocks are scaled and added up, else 1
//   load(from, i)   one read, part i of a register
//   pair(read, q)   pair q of it
template <class Stored>
struct PairProducts {
    // For each block a token has its pairs, and before them what `Stored` makes of their sum.
    using Word = int32_t;
    static constexpr size_t kLead = Stored::kLead;
    static constexpr size_t kInputs = kBlockInputs, kSpan = kLead + kPairs;
    static constexpr size_t kRead = Stored::kBlockBytes * Stored::kAtOnce / kPairs;
    static constexpr bool kCompact = true;

    // Sums of all blocks wait in registers where there are enough, else in memory.
    static constexpr bool kHeld = kParts == 1;

    // Whether P panels times T tokens fit the registers, `parts` parts of each at a time.
    static constexpr bool fits(int panels, int width, int parts) {
        if (Stored::kEach == 2 && !kHeld) return panels * width <= kSums;
        return (Stored::kEach * width + 2) * panels * parts + 1 <= kRegisters;
    }
    static constexpr int widest() {
        int width_limit = 1;
        for (const int width : kWidths)
            if (fits(1, width, 1)) width_limit = width;
        return width_limit;
    }
    static constexpr int kMaxTokens = widest();
    static constexpr int panels(int width) {
        int panels = 4;
        while (panels > 1 && !fits(panels, width, kParts)) panels /= 2;
        return panels;
    }
    template <int P, int T>
    static constexpr int together() {
        int parts = kParts;
        while (parts > 1 && !fits(P, T, parts)) parts /= 2;
        return parts;
    }

    static const float* scales(const void* x) { return static_cast<const float*>(x); }
    static const int32_t* words(const void* x, size_t n) {
        return static_cast<const int32_t*>(x) + padded(n);
    }
    static size_t blocks(size_t inputs) { return blocks_of(inputs); }

    // Adds the products of one block, whose weights begin at `from`, to the sums: N parts of each
    // from `part` on.
    template <int P, int T, int N>
    INLINE_MEMBER void add_block(Int (&sum)[P][T][N], const uint8_t* from, size_t panel_bytes,
                                 const int32_t* x, int part, Ahead ahead) {
        constexpr size_t kFetch = Stored::kAtOnce > 2 ? Stored::kAtOnce : 2;
#pragma GCC unroll 2
        for (size_t pair = 0; pair < kPairs; pair += Stored::kAtOnce) {
            Shorts read[P][N];
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                for (int i = 0; i < N; ++i)
                    read[p][i] = Stored::load(
                        from + p * panel_bytes + pair / Stored::kAtOnce * kRead, part + i);
            if (part == 0 && pair % kFetch == 0)
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
                    __builtin_prefetch(
                        ahead.from + p * panel_bytes + pair * ahead.step / kPairs, 0,
                        fetches_near<T> ? 3 : 2);
#pragma GCC unroll 32
            for (size_t q = 0; q < Stored::kAtOnce; ++q) {
                Shorts w[P][N];
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                    for (int i = 0; i < N; ++i) w[p][i] = Stored::pair(read[p][i], q);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    const Shorts value = (Shorts)(x[(pair + q) * T + t] - Int{});
#pragma GCC unroll 32
                    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                        for (int i = 0; i < N; ++i)
                            sum[p][t][i] = add_pairs(sum[p][t][i], w[p][i], value);
                }
            }
        }
    }

    static size_t arranged_bytes(size_t n, size_t inputs) {
        return arranged_pair_bytes<PairProducts>(n, inputs);
    }
    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs,
                        const int32_t* order, void* out, size_t part, size_t parts) {
        arrange_pairs<PairProducts>(rows, stride, n, inputs, order, out, part, parts);
    }

    // One block of one token: what leads, then the pairs, `width` words apart.
    static void arrange_block(const int32_t* numbers, int32_t* to, size_t width) {
        int32_t sum = 0;
        for (size_t pair = 0; pair < kPairs; ++pair) {
            const int32_t a = numbers[2 * pair], b = numbers[2 * pair + 1];
            sum += a + b;
            to[(kLead + pair) * width] = as_pair(a, b);
        }
        if constexpr (kLead > 0) to[0] = Stored::lead(sum);
    }
};

}  // namespace

}  // namespace paceline

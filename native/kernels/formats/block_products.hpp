// Products of int16 activations and weights in blocks of 32 inputs: codes of 2 to 8 bits, one or
// two scales for each block, and minima in some formats. All formats that use them share one
// layout of activations.
//
// A token's row becomes int16 numbers with one scale. Each block has three leading words, then
// sixteen pairs: of inputs 4q .. 4q + 3, first 4q and 4q + 2, then 4q + 1 and 4q + 3. Weights are
// decoded to unsigned bytes, four neighbouring inputs of a row in one word ("quad"): its even and
// its odd bytes are the two pairs. Sums over 16 or 32 inputs are exact, in int32; they are scaled
// and added in fp32, in order.
#pragma once

#include "kernels/formats/integer_pairs.hpp"

namespace paceline {

namespace {

constexpr size_t kGroup = 8;  // blocks whose scales are decoded together
constexpr size_t kHalfQuads = kBlockInputs / 8;
constexpr size_t kWordBytes = 4 * kPanel;  // a word of each of sixteen rows
constexpr int kCodeOffset = 128;           // added to signed codes

// Words that lead a block: the sum of its 32 numbers, of the first and of the last 16, each times
// -kCodeOffset.
constexpr size_t kLeads = 3;
constexpr size_t kBlockWords = kLeads + kPairs;

// Scales and minima of the blocks of a group: [block][half][16 rows]. Minima are divided by
// -kCodeOffset, as the leading words are multiplied with it.
struct BlockScales {
    alignas(64) float scales[kGroup * 2 * kPanel];
    alignas(64) float minima[kGroup * 2 * kPanel];
};

INLINE Int splat_word(int32_t value) { return value - Int{}; }
INLINE Shorts even_pair(Int quad) { return (Shorts)(quad & 0x00ff00ff); }
INLINE Shorts odd_pair(Int quad) {
    using Unsigned = uint16_t __attribute__((vector_size(kBytes), may_alias));
    return (Shorts)((Unsigned)quad >> 8);
}

// How activations are laid out.
struct BlockActivations {
    static constexpr size_t kSpan = kBlockWords;
    static constexpr int kMaxTokens = kWidest;

    static void arrange_block(const int32_t* numbers, int32_t* to, size_t width) {
        int32_t sums[2] = {};
        for (size_t k = 0; k < kBlockInputs; ++k) sums[k / (kBlockInputs / 2)] += numbers[k];
        to[0] = -kCodeOffset * (sums[0] + sums[1]);
        to[width] = -kCodeOffset * sums[0];
        to[2 * width] = -kCodeOffset * sums[1];
        for (size_t quad = 0; quad < kBlockInputs / 4; ++quad) {
            const int32_t* from = numbers + 4 * quad;
            to[(kLeads + 2 * quad) * width] = as_pair(from[0], from[2]);
            to[(kLeads + 2 * quad + 1) * width] = as_pair(from[1], from[3]);
        }
    }

    // What `finish` asks for.
    static const float* scales(const void* x) { return static_cast<const float*>(x); }
};

// Some panels times one tile: up to kGroup blocks of it.
struct BlockTile {
    const uint8_t* codes;  // of the first block of the first panel
    size_t panel_bytes, stride;  // bytes between panels, and between blocks
    const uint8_t* table;  // sixteen bytes that 4-bit codes name; or null
    const BlockScales* factors;  // [panels]
    size_t panels, blocks;
    const int32_t* x;  // [blocks][kBlockWords][width]
    size_t width;
    Sums sums;
    size_t fetch;  // how far ahead memory is fetched, in bytes
};

// Tokens that are multiplied together: a wider tile is cut in two.
constexpr int kTogether = kParts == 1 ? 12 : kWidest;

// `Codes::quad` decodes; see block_codes.hpp. A block has kScales scales, and as many minima or none.
template <class Codes, int kScales, bool kMinima>
struct BlockProducts {
    static constexpr bool kHeld = kParts == 1;  // sums of all blocks wait in registers
    static constexpr int panels(int width) {
        if (kHeld) return width <= 2 ? 4 : width <= 4 ? 2 : 1;
        return width * 4 <= kSums ? 4 : width * 2 <= kSums ? 2 : 1;
    }

    // `T` tokens of a tile, from `token` on, times all panels.
    template <int T>
    static void multiply(const BlockTile& job, size_t token) {
        constexpr size_t P = panels(T);
        for (size_t first = 0; first < job.panels; first += P) tile<P, T>(job, first, token);
    }

    // Where fewer than P panels are left, the last ones are computed twice.
    template <int P, int T>
    static void tile(const BlockTile& job, size_t first, size_t token) {
        const uint8_t* codes[P];
        const BlockScales* factors[P];
        float* sums[P];
        alignas(64) float spare[P > 1 ? T * kPanel : 1];
#pragma GCC unroll 4
        for (size_t p = 0; p < P; ++p) {
            const bool real = first + p < job.panels;
            const size_t panel = real ? first + p : first;
            codes[p] = job.codes + panel * job.panel_bytes;
            factors[p] = job.factors + panel;
            sums[p] = real ? job.sums.at + panel * job.sums.stride + token * kPanel : spare;
        }
        const size_t stride = job.width;
        const int32_t* x = job.x + token;
        Reg total[P][T][kParts];
        each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
            total[p][t][i] = job.sums.resume ? load_part(sums[p] + t * kPanel, i) : Reg{};
            if (!kHeld) store_part(sums[p] + t * kPanel, i, total[p][t][i]);
        });
        for (size_t block = 0, scale = 0; block < job.blocks; ++block) {
            Int sum[P][T][kParts];
#pragma GCC unroll 1
            for (size_t half = 0; half < 2; ++half) {
                const int32_t* leads = x + (kScales == 1 ? 0 : 1 + half) * stride;
                if (kScales == 2 || half == 0)
                    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                        sum[p][t][i] = kMinima ? Int{} : splat_word(leads[t]);
                    });
                add_half<P, T>(sum, codes, half, job, x + (kLeads + kPairs / 2 * half) * stride);
                if (kScales == 1 && half == 0) continue;
                each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                    float* at = sums[p] + t * kPanel;
                    Reg value = kHeld ? total[p][t][i] : load_part(at, i);
                    value = reg_fma(__builtin_convertvector(sum[p][t][i], Reg),
                                    load_part(factors[p]->scales + scale, i), value);
                    if constexpr (kMinima)
                        value = reg_fma(__builtin_convertvector(splat_word(leads[t]), Reg),
                                        load_part(factors[p]->minima + scale, i), value);
                    if (kHeld)
                        total[p][t][i] = value;
                    else
                        store_part(at, i, value);
                });
                scale += kPanel;
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) codes[p] += job.stride;
            x += kBlockWords * stride;
        }
        if (kHeld)
            each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                store_part(sums[p] + t * kPanel, i, total[p][t][i]);
            });
    }

    // Adds the products of half a block.
    template <int P, int T>
    INLINE_MEMBER void add_half(Int (&sum)[P][T][kParts], const uint8_t* const (&codes)[P],
                                size_t half, const BlockTile& job, const int32_t* x) {
        constexpr int kQuads = static_cast<int>(kHalfQuads);
        constexpr int kFetched = static_cast<int>((Codes::kWords + 1) / 2);  // lines of half a block
#pragma GCC unroll 4
        for (int q = 0; q < kQuads; ++q) {
            Int quad[P][kParts];
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                if (q < kFetched)
                    __builtin_prefetch(codes[p] + job.fetch +
                                           (half * kFetched + static_cast<size_t>(q)) * kWordBytes,
                                       0, fetches_near<T> ? 3 : 2);
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i)
                    quad[p][i] = Codes::quad(codes[p], half, q, i, job.table);
            }
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                Shorts w[P][kParts];
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
                    for (int i = 0; i < kParts; ++i)
                        w[p][i] = odd ? odd_pair(quad[p][i]) : even_pair(quad[p][i]);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    const Shorts value = (Shorts)splat_word(x[t]);
#pragma GCC unroll 4
                    for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
                        for (int i = 0; i < kParts; ++i)
                            sum[p][t][i] = add_pairs(sum[p][t][i], w[p][i], value);
                }
                x += job.width;
            }
        }
    }
};

// As `fetch_distance`: short panels end before the machine foresees them, so the next ones are
// fetched.
INLINE size_t block_fetch(const Tiling& tiles, size_t panels, size_t panel_bytes) {
    const size_t width = tiles.width;
    const size_t far = width == 1 || width > 4 ? size_t{1} << 15 : size_t{1} << 18;
    const bool next = tiles.count == 1 && (kParts == 1 || width == 1);
    return next && panel_bytes < far ? panels * panel_bytes : 4096;
}

}  // namespace

}  // namespace paceline

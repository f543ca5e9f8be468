// Products of int16 activations and weights in blocks of 32 inputs: codes of up to 8 bits, one or
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

constexpr size_t kGroup = 8;                     // blocks that are decoded together
constexpr size_t kQuads = kBlockInputs / 4;      // of a block
constexpr size_t kQuadBytes = 4 * kPanel;        // of sixteen rows
constexpr size_t kBlockCodes = kQuads * kQuadBytes;
constexpr int kCodeOffset = 128;                 // added to signed codes

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
INLINE Shorts even_pair(Int quads) { return (Shorts)(quads & 0x00ff00ff); }
INLINE Shorts odd_pair(Int quads) {
    using Unsigned = uint16_t __attribute__((vector_size(kBytes), may_alias));
    return (Shorts)((Unsigned)quads >> 8);
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
        for (size_t quad = 0; quad < kQuads; ++quad) {
            const int32_t* from = numbers + 4 * quad;
            to[(kLeads + 2 * quad) * width] = as_pair(from[0], from[2]);
            to[(kLeads + 2 * quad + 1) * width] = as_pair(from[1], from[3]);
        }
    }

    // What `finish` asks for.
    static const float* scales(const void* x) { return static_cast<const float*>(x); }
    static F16 total(const float* sums, const uint8_t*) { return load(sums); }
};

// One panel times one tile: `blocks` blocks of it, decoded.
struct BlockTile {
    const uint8_t* codes;
    size_t stride;  // bytes between blocks
    const BlockScales* factors;
    const int32_t* x;  // [blocks][kBlockWords][T]
    size_t blocks;
    float* sums;  // [T][16]
    bool resume;  // go on with what is there
};

// H scales for each block; minima if M, else codes have kCodeOffset added.
template <int T, int H, bool M>
static void multiply_tile(BlockTile job) {
    constexpr bool kHeld = kParts == 1 && T <= 12;
    Reg total[T][kParts];
    each<1, T>([&](int, int t, int i) {
        total[t][i] = job.resume ? load_part(job.sums + t * kPanel, i) : Reg{};
        if (!kHeld) store_part(job.sums + t * kPanel, i, total[t][i]);
    });
    const float *scales = job.factors->scales, *minima = job.factors->minima;
    for (size_t block = 0; block < job.blocks; ++block) {
#pragma GCC unroll 2
        for (int h = 0; h < H; ++h) {
            const int32_t* leads = job.x + (H == 1 ? 0 : 1 + h) * T;
            const int32_t* x = job.x + (kLeads + kPairs / H * h) * T;
            const uint8_t* codes = job.codes + kBlockCodes / H * h;
            Int sum[T][kParts];
            each<1, T>([&](int, int t, int i) { sum[t][i] = M ? Int{} : splat_word(leads[t]); });
#pragma GCC unroll 1
            for (size_t quad = 0; quad < kQuads / H; ++quad) {
                Int read[kParts];
                for (int i = 0; i < kParts; ++i)
                    read[i] = (Int)load_part((const float*)(codes + quad * kQuadBytes), i);
#pragma GCC unroll 2
                for (int odd = 0; odd < 2; ++odd) {
                    Shorts w[kParts];
                    for (int i = 0; i < kParts; ++i)
                        w[i] = odd ? odd_pair(read[i]) : even_pair(read[i]);
                    each<1, T>([&](int, int t, int i) {
                        const Shorts value = (Shorts)splat_word(x[(2 * quad + odd) * T + t]);
                        sum[t][i] = add_pairs(sum[t][i], w[i], value);
                    });
                }
            }
            each<1, T>([&](int, int t, int i) {
                float* at = job.sums + t * kPanel;
                Reg value = kHeld ? total[t][i] : load_part(at, i);
                const Reg exact = __builtin_convertvector(sum[t][i], Reg);
                value = reg_fma(exact, load_part(scales + h * kPanel, i), value);
                if constexpr (M) {
                    const Reg lead = __builtin_convertvector(splat_word(leads[t]), Reg);
                    value = reg_fma(lead, load_part(minima + h * kPanel, i), value);
                }
                if (kHeld)
                    total[t][i] = value;
                else
                    store_part(at, i, value);
            });
        }
        job.codes += job.stride;
        job.x += kBlockWords * T;
        scales += H * kPanel;
        minima += H * kPanel;
    }
    if (kHeld)
        each<1, T>(
            [&](int, int t, int i) { store_part(job.sums + t * kPanel, i, total[t][i]); });
}

template <int H, bool M>
static void multiply_tile_of(size_t width, const BlockTile& job) {
    with_width(width, [&](auto t) { multiply_tile<decltype(t)::value, H, M>(job); });
}

}  // namespace

}  // namespace paceline

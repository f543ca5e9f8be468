// Weights as integers, in blocks of 32 inputs with one scale each. Sums over a block are exact, in
// int32; blocks are added in fp32, in order.
//
// A panel holds, for each block, sixteen bf16 scales and then the weights of sixteen rows.
#pragma once

#include "kernels/formats/integer_pairs.hpp"

namespace paceline {

namespace {

constexpr size_t kScaleBytes = kPanel * sizeof(uint16_t);

// How the 512 weights of a block are kept; see PairProducts.
struct Int8 {
    static constexpr size_t kBlockBytes = 512, kAtOnce = 1;
    static constexpr int kLow = -128, kOffset = 0, kEach = 2;
    // Tried: parts of the scale that gives the largest weight the number of largest size.
    static constexpr float kFactors[] = {1.0f, 1.008f};
    static constexpr int kRounds = 1;
    static Shorts load(const uint8_t* from, int part) {
        return widen(*(const SignedBytes*)(from + part * kBytes / 2));
    }
    static Shorts pair(Shorts read, size_t) { return read; }
    static void put(uint8_t* block, size_t pair, size_t row, size_t half, int value) {
        block[pair * 2 * kPanel + row * 2 + half] = static_cast<uint8_t>(value);
    }
    static int get(const uint8_t* block, size_t pair, size_t row, size_t half) {
        return static_cast<int8_t>(block[pair * 2 * kPanel + row * 2 + half]);
    }
};

// Two neighbouring pairs share bytes: the even one in the low half. Stored with 8 added.
struct Int4 {
    static constexpr size_t kBlockBytes = 256, kAtOnce = 2;
    static constexpr int kLow = -8, kOffset = 8, kEach = 2;
    static constexpr float kFactors[] = {1.12f, 1.03f, 0.94f, 0.85f, 0.76f};
    static constexpr int kRounds = 2;
    static Shorts load(const uint8_t* from, int part) {
        return widen(*(const PlainBytes*)(from + part * kBytes / 2));
    }
    static Shorts pair(Shorts read, size_t q) { return q ? read >> 4 : read & 15; }
    static void put(uint8_t* block, size_t pair, size_t row, size_t half, int value) {
        uint8_t& byte = block[pair / 2 * 2 * kPanel + row * 2 + half];
        const int stored = value + kOffset;
        byte = static_cast<uint8_t>(pair % 2 ? (byte & 15) | stored << 4 : (byte & 240) | stored);
    }
    static int get(const uint8_t* block, size_t pair, size_t row, size_t half) {
        const uint8_t byte = block[pair / 2 * 2 * kPanel + row * 2 + half];
        return (pair % 2 ? byte >> 4 : byte & 15) - kOffset;
    }
};

template <class Stored>
struct IntWeights : PairProducts<Stored> {
    using Products = PairProducts<Stored>;
    using Products::blocks, Products::kHeld, Products::kLead, Products::kSpan;
    static constexpr size_t kStep = kScaleBytes + Stored::kBlockBytes;

    static F16 total(const float* sums, const uint8_t*) { return load(sums); }

    template <int P, int T>
    static void tile(const uint8_t* panels, size_t panel_bytes, const int32_t* x, size_t steps,
                     Sums sums, Ahead ahead) {
        Reg total[P][T][kParts];
        each<P, T>([&](int p, int t, int i) {
            total[p][t][i] = sums.resume ? load_part(place(sums, p, t), i) : Reg{};
            if (!kHeld) store_part(place(sums, p, t), i, total[p][t][i]);
        });
        for (size_t step = 0; step < steps; ++step) {
            Int sum[P][T][kParts];
            each<P, T>([&](int p, int t, int i) { sum[p][t][i] = kLead ? x[t] - Int{} : Int{}; });
            Products::template add_block<P, T>(sum, panels + kScaleBytes, panel_bytes,
                                               x + kLead * T, 0, ahead);
            each<P, 1>([&](int p, int, int i) {
                const Reg scale = Bf16::part(panels + p * panel_bytes, i);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    float* at = place(sums, p, t);
                    const Reg exact = __builtin_convertvector(sum[p][t][i], Reg);
                    if (kHeld) {
                        total[p][t][i] = reg_fma(exact, scale, total[p][t][i]);
                    } else {
                        store_part(at, i, reg_fma(exact, scale, load_part(at, i)));
                    }
                }
            });
            x += kSpan * T;
            panels += kStep;
            ahead.from += ahead.step;
        }
        if (kHeld)
            each<P, T>([&](int p, int t, int i) {
                store_part(place(sums, p, t), i, total[p][t][i]);
            });
    }

    static size_t panel_bytes(size_t inputs) { return blocks(inputs) * kStep; }

    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        for (size_t block = 0; block < blocks(inputs); ++block) {
            float values[kBlockInputs][kPanel] = {};
            const size_t first = block * kBlockInputs;
            for (size_t row = 0; row < rows; ++row)
                for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k)
                    values[k][row] = weights[row * inputs + first + k];
            pack_block(values, panel + block * kStep);
        }
        return true;
    }

    // Sixteen rows at once. Each tries some scales, and after each the one that fits its numbers
    // best, and keeps that of the least squared error.
    static void pack_block(const float (&values)[kBlockInputs][kPanel], uint8_t* block) {
        F16 edge = splat(0.0f), best = edge, least = splat(__builtin_inff());
        for (const auto& value : values)
            edge = where_less(size(edge), size(load(value)), load(value), edge);
        for (const float factor : Stored::kFactors) {
            F16 scale = Bf16::rounded(edge * splat(1.0f / Stored::kLow) * splat(factor));
            for (int round = 0; round < Stored::kRounds; ++round) {
                const F16 inverse = inverse_of(scale);
                F16 error = splat(0.0f), cross = error, square = error;
                for (const auto& value : values) {
                    const F16 number = nearest(load(value), inverse);
                    const F16 missed = load(value) - number * scale;
                    error = error + missed * missed;
                    cross = cross + load(value) * number;
                    square = square + number * number;
                }
                best = where_less(error, least, scale, best);
                least = min(error, least);
                scale = Bf16::rounded(cross / max(square, splat(1.0f)));
            }
        }
        float scales[kPanel], numbers[kPanel];
        store(scales, best);
        for (size_t row = 0; row < kPanel; ++row)
            ((uint16_t*)block)[row] = Bf16::to(scales[row]);
        for (size_t k = 0; k < kBlockInputs; ++k) {
            store(numbers, nearest(load(values[k]), inverse_of(best)));
            for (size_t row = 0; row < kPanel; ++row)
                Stored::put(block + kScaleBytes, k / 2, row, k % 2, static_cast<int>(numbers[row]));
        }
    }

    static F16 size(F16 value) { return max(value, splat(0.0f) - value); }
    // Of a block without weights, zero.
    static F16 inverse_of(F16 scale) {
        return where_less(size(scale), splat(1e-30f), splat(0.0f), splat(1.0f) / scale);
    }
    static F16 nearest(F16 value, F16 inverse) {
        const F16 magic = splat(12582912.0f);  // adding it rounds to an integer
        const F16 number = min(max(value * inverse, splat(Stored::kLow)), splat(-1 - Stored::kLow));
        return (number + magic) - magic;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        for (size_t block = 0; block < blocks(inputs); ++block) {
            const uint8_t* from = panel + block * kStep;
            uint8_t* out = to + block * kStep;
            ((uint16_t*)out)[to_lane] = ((const uint16_t*)from)[lane];
            for (size_t k = 0; k < kBlockInputs; ++k)
                Stored::put(out + kScaleBytes, k / 2, to_lane, k % 2,
                            Stored::get(from + kScaleBytes, k / 2, lane, k % 2));
        }
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        for (size_t k = 0; k < inputs; ++k) {
            const uint8_t* block = panel + k / kBlockInputs * kStep;
            const size_t at = k % kBlockInputs;
            const int value = Stored::get(block + kScaleBytes, at / 2, lane, at % 2);
            out[k] = static_cast<float>(value) * Bf16::from(((const uint16_t*)block)[lane]) * scale;
        }
    }
};

static const FormatKernels int8_kernels = panel_kernels<IntWeights<Int8>>;
static const FormatKernels int4_kernels = panel_kernels<IntWeights<Int4>>;

}  // namespace

}  // namespace paceline

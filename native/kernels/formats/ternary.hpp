// Weights of -1, 0 and 1 in two bits, with one fp32 scale for each row: BitNet's matrices, exactly.
// A row's sum of products is one exact integer; it is scaled once, at the end.
//
// A panel holds the sixteen scales and then the weights of sixteen rows: in a read of 64 bytes,
// for each row and half of a pair, eight pairs in 16 bits, the first in the lowest.
#pragma once

#include "kernels/formats/integer_pairs.hpp"

namespace paceline {

namespace {

struct Ternary {
    static constexpr size_t kBlockBytes = 128, kAtOnce = 8;
    static constexpr size_t kLead = 0;
    static constexpr int kEach = 1;
    static Shorts load(const uint8_t* from, int part) { return ((const LooseShorts*)from)[part]; }
    static Shorts pair(Shorts read, size_t q) { return (read << (14 - 2 * q)) >> 14; }
};

struct TernaryWeights : PairProducts<Ternary> {
    static constexpr size_t kStep = Ternary::kBlockBytes;
    static constexpr size_t kHeader = kPanel * sizeof(float);

    template <int P, int T>
    static void tile(const uint8_t* panels, size_t panel_bytes, const int32_t* x, size_t steps,
                     Sums sums, Ahead ahead) {
        constexpr int kTogether = together<P, T>();
#pragma GCC unroll 32
        for (int part = 0; part < kParts; part += kTogether)
            parts<P, T, kTogether>(panels, panel_bytes, x, steps, sums, part, ahead);
    }

    template <int P, int T, int N>
    INLINE_MEMBER void parts(const uint8_t* panels, size_t panel_bytes, const int32_t* x,
                             size_t steps, Sums sums, int part, Ahead ahead) {
        Int sum[P][T][N];
        each<P, T, N>([&](int p, int t, int i) {
            sum[p][t][i] = sums.resume ? (Int)load_part(place(sums, p, t), part + i) : Int{};
        });
        for (size_t step = 0; step < steps; ++step) {
            add_block<P, T, N>(sum, panels + kHeader, panel_bytes, x, part, ahead);
            x += kSpan * T;
            panels += kStep;
            ahead.from += ahead.step;
        }
        each<P, T, N>([&](int p, int t, int i) {
            store_part(place(sums, p, t), part + i, (Reg)sum[p][t][i]);
        });
    }

    static F16 total(const float* sums, const uint8_t* panel) {
        F16 out;
        for (int i = 0; i < kParts; ++i)
            out.part[i] = __builtin_convertvector((Int)load_part(sums, i), Reg);
        return out * load((const float*)panel);
    }

    static size_t panel_bytes(size_t inputs) { return kHeader + blocks(inputs) * kStep; }
    // More could exceed 32 bits in a sum.
    static size_t max_inputs() { return INT32_MAX / static_cast<size_t>(kMaxActivation); }

    // The 16 bits that hold input k of a row.
    static uint16_t* word(uint8_t* panel, size_t k, size_t row) {
        const size_t read = k / 2 / Ternary::kAtOnce;
        return (uint16_t*)(panel + kHeader) + (read * kPanel + row) * 2 + k % 2;
    }
    static int shift(size_t k) { return static_cast<int>(k / 2 % Ternary::kAtOnce * 2); }

    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        std::memset(panel, 0, panel_bytes(inputs));
        for (size_t row = 0; row < rows; ++row) {
            const float* from = weights + row * inputs;
            float& scale = ((float*)panel)[row];
            for (size_t k = 0; k < inputs; ++k) {
                if (from[k] == 0.0f) continue;
                const float size = __builtin_fabsf(from[k]);
                if (scale == 0.0f) scale = size;
                if (size != scale) return false;
                *word(panel, k, row) |= static_cast<uint16_t>((from[k] > 0.0f ? 1 : 3) << shift(k));
            }
        }
        return inputs <= max_inputs();
    }

    // A row's words lie beside those of the others.
    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        ((float*)to)[to_lane] = ((const float*)panel)[lane];
        for (size_t k = 0; k < inputs; k += 2 * Ternary::kAtOnce)
            for (size_t half = 0; half < 2; ++half)
                *word(to, k + half, to_lane) = *word(const_cast<uint8_t*>(panel), k + half, lane);
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        const float size = ((const float*)panel)[lane];
        for (size_t k = 0; k < inputs; ++k) {
            const int bits = *word(const_cast<uint8_t*>(panel), k, lane) >> shift(k) & 3;
            out[k] = static_cast<float>(bits == 3 ? -1 : bits) * size * scale;
        }
    }
};

static const FormatKernels ternary_kernels =
    format_kernels<TernaryWeights>("ternary", "int8", false);

}  // namespace

}  // namespace paceline

// Weights as floating-point numbers: fp32, bf16, fp16. All sums are fp32.
//
// A number format says how many inputs of a row lie side by side (`kTogether`), so that one
// register gives the weights of as many inputs.
#pragma once

#include "kernels/matmul.hpp"

namespace paceline {

namespace {

struct Fp32 {
    using Stored = float;
    static constexpr size_t kTogether = 1;
    static Reg read(const uint8_t* from, int part, size_t) {
        return load_part((const float*)from, part);
    }
    static float to(float value) { return value; }
    static float from(float value) { return value; }
};

struct Bf16 {
    using Stored = uint16_t;
    static constexpr size_t kTogether = 2;
    static Reg read(const uint8_t* from, int part, size_t k) {
        const Int both = (Int)load_part((const float*)from, part);
        return (Reg)(k == 0 ? both << 16 : both & static_cast<int32_t>(0xffff0000));
    }
    // Numbers that lie alone: the scales of blocks.
    static Reg part(const uint8_t* from, int part) {
        return (Reg)(widen(((const PlainShorts*)from)[part]) << 16);
    }
    // To the nearest, ties to even.
    static uint16_t to(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static F16 rounded(F16 value) {
        for (int i = 0; i < kParts; ++i) {
            const Int bits = (Int)value.part[i];
            value.part[i] = (Reg)((bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff);
        }
        return value;
    }
    static float from(uint16_t stored) {
        const uint32_t bits = uint32_t{stored} << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }
};

struct Fp16 {
    using Stored = uint16_t;
    static constexpr size_t kTogether = 1;
    static Reg read(const uint8_t* from, int part, size_t) {
        const PlainShorts bits = ((const PlainShorts*)from)[part];
#if defined(__AVX512F__)
        return (Reg)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#elif defined(__AVX2__)
        return (Reg)_mm256_cvtph_ps((__m128i)bits);
#elif defined(PACELINE_NEON)
        return (Reg)vcvt_f32_f16((float16x4_t)bits);
#else
        // Exponent and fraction in their places, then the exponent's bias by a product.
        const Int wide = widen(bits);
        const Reg size = (Reg)((wide & 0x7fff) << 13) * 0x1p112f;
        return (Reg)((Int)size | (wide & 0x8000) << 16);
#endif
    }
    // To the nearest, ties to even; beyond the range, the largest number.
    static uint16_t to(float value) {
        const float size = __builtin_fabsf(value);
        uint32_t bits;
        const float scaled = size < 65504.0f ? size * 0x1p-112f : 65504.0f * 0x1p-112f;
        std::memcpy(&bits, &scaled, sizeof(bits));
        bits = (bits + 0xfff + (bits >> 13 & 1)) >> 13;
        return static_cast<uint16_t>(bits | (value < 0.0f ? 0x8000u : 0u));
    }
    static Reg part(const uint8_t* from, int part) { return read(from, part, 0); }
    // To the nearest, ties to even; finite results only.
    static Reg rounded(Reg value) {
#if defined(__AVX512F__)
        return (Reg)_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtps_ph(0xffff, (__m512)value, 0));
#elif defined(__AVX2__)
        return (Reg)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)value, 0));
#else
        const Int bits = (Int)(value * 0x1p-112f);
        return (Reg)((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fff) * 0x1p112f;
#endif
    }
    static F16 rounded(F16 value) {
        float lanes[kPanel];
        store(lanes, value);
        for (float& lane : lanes) lane = from(to(lane));
        return load(lanes);
    }
    static float from(uint16_t stored) {
        const uint32_t bits = (stored & 0x7fffu) << 13;
        float size;
        std::memcpy(&size, &bits, sizeof(size));
        return (stored & 0x8000 ? -size : size) * 0x1p112f;
    }
};

// A panel holds [K / kTogether][16][kTogether] numbers.
template <class Number>
struct FloatWeights {
    using Word = float;
    using Stored = typename Number::Stored;
    static constexpr size_t kInputs = Number::kTogether, kSpan = kInputs;
    static constexpr size_t kStep = kInputs * kPanel * sizeof(Stored);
    static constexpr bool kCompact = sizeof(Stored) < 4;
    static constexpr int kMaxTokens = kWidest;
    static constexpr int panels(int width) {
        int panels = 4;
        while (panels > 1 && panels * width > kSums) panels /= 2;
        return panels;
    }

    static const float* words(const void* x, size_t) { return static_cast<const float*>(x); }
    static const float* scales(const void*) { return nullptr; }
    static F16 total(const float* sums, const uint8_t*) { return load(sums); }

    template <int P, int T>
    static void tile(const uint8_t* panels, size_t panel_bytes, const float* x, size_t steps,
                     Sums sums, Ahead ahead) {
        Reg sum[P][T][kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    sum[p][t][i] =
                        sums.resume ? load_part(sums.at + p * sums.stride + t * kPanel, i) : Reg{};
        for (size_t step = 0; step < steps; ++step) {
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
                __builtin_prefetch(ahead.from + p * panel_bytes, 0, fetches_near<T> ? 3 : 2);
#pragma GCC unroll 32
            for (size_t k = 0; k < kInputs; ++k) {
                Reg w[P][kParts];
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                    for (int i = 0; i < kParts; ++i)
                        w[p][i] = Number::read(panels + p * panel_bytes, i, k);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    const Reg value = x[k * T + t] - Reg{};
#pragma GCC unroll 32
                    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                        for (int i = 0; i < kParts; ++i)
                            sum[p][t][i] = reg_fma(w[p][i], value, sum[p][t][i]);
                }
            }
            panels += kStep;
            ahead.from += ahead.step;
            x += kInputs * T;
        }
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    store_part(sums.at + p * sums.stride + t * kPanel, i, sum[p][t][i]);
    }

    static size_t steps(size_t inputs) { return (inputs + kInputs - 1) / kInputs; }
    static size_t panel_bytes(size_t inputs) { return steps(inputs) * kStep; }
    static size_t place(size_t k, size_t row) {
        return (k / kInputs * kPanel + row) * kInputs + k % kInputs;
    }

    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        auto* to = (Stored*)panel;
        for (size_t k = 0; k < steps(inputs) * kInputs; ++k)
            for (size_t row = 0; row < kPanel; ++row) {
                const bool inside = row < rows && k < inputs;
                to[place(k, row)] = Number::to(inside ? weights[row * inputs + k] : 0.0f);
            }
        return true;
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        const auto* from = (const Stored*)panel;
        for (size_t k = 0; k < inputs; ++k) out[k] = Number::from(from[place(k, lane)]) * scale;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        for (size_t k = 0; k < steps(inputs) * kInputs; ++k)
            ((Stored*)to)[place(k, to_lane)] = ((const Stored*)panel)[place(k, lane)];
    }

    // A single row is read as it is: its padding is zero.
    static size_t arranged_bytes(size_t n, size_t inputs) {
        return n == 1 ? 0 : room(tiling(n, kMaxTokens)) * steps(inputs) * kInputs * sizeof(float);
    }

    // Rows [n][stride] to tiles [K][T]; part `part` of `parts` takes its share of the inputs.
    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs, const int32_t*,
                        void* out, size_t part, size_t parts) {
        const Tiling tiles = tiling(n, kMaxTokens);
        const size_t whole = steps(inputs) * kInputs;
        const size_t begin = whole * part / parts, end = whole * (part + 1) / parts;
        for (size_t tile = 0; tile < tiles.count; ++tile) {
            const size_t tokens = tiles.tokens(tile), width = tiles.width_of(tile);
            float* to = static_cast<float*>(out) + tile * tiles.width * whole;
            const float* from = rows + tile * tiles.width * stride;
            for (size_t k = begin; k < end; ++k) {
                size_t t = 0;
                for (; t < tokens && k < inputs; ++t) to[k * width + t] = from[t * stride + k];
                for (; t < width; ++t) to[k * width + t] = 0.0f;
            }
        }
    }
};

// What a format W whose groups are fixed says of its panels.
template <class W>
constexpr void set_panels(FormatKernels& kernels) {
    kernels.panel_bytes = [](size_t inputs, size_t) { return W::panel_bytes(inputs); };
    kernels.unpack = [](const uint8_t* panel, size_t lane, size_t inputs, size_t, float scale,
                        float* out) { W::unpack(panel, lane, inputs, scale, out); };
    kernels.copy = [](const uint8_t* panel, size_t lane, size_t inputs, size_t, uint8_t* to,
                      size_t to_lane) { W::copy(panel, lane, inputs, to, to_lane); };
}

// The entry of a format W in the list. `head` names the format of embedding and head beside it.
template <class W>
constexpr FormatKernels format_kernels(const char* name, const char* head, bool for_heads = true) {
    FormatKernels kernels{};
    kernels.name = name;
    kernels.head = head;
    kernels.for_heads = for_heads;
    set_panels<W>(kernels);
    kernels.pack = W::pack;
    if constexpr (requires { W::load; }) {
        kernels.holds = W::holds;
        kernels.load = [](const GroupedRows& from, size_t, uint8_t* panel) {
            W::load(from, panel);
        };
    }
    kernels.product = {W::arranged_bytes, W::arrange, multiply<W>, multiply_scratch<W>};
    return kernels;
}

using Fp32Weights = FloatWeights<Fp32>;
static const FormatKernels fp32_kernels = format_kernels<Fp32Weights>("fp32", "fp32");
static const FormatKernels bf16_kernels = format_kernels<FloatWeights<Bf16>>("bf16", "bf16");
static const FormatKernels fp16_kernels = format_kernels<FloatWeights<Fp16>>("fp16", "fp16");

}  // namespace

}  // namespace paceline

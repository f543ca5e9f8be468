// Weights as integers, in blocks of 32 inputs with one scale each; activations as int16 with one
// scale for each token. Sums over a block are exact, in int32; blocks are added in fp32, in order.
//
// A panel holds, for each block, sixteen bf16 scales and then the weights of sixteen rows, two
// neighbouring inputs side by side, as the instructions that multiply pairs want them.
#pragma once

#include "floats.hpp"

namespace {

constexpr size_t kBlockInputs = 32;
constexpr size_t kPairs = kBlockInputs / 2;
constexpr size_t kScaleBytes = kPanel * sizeof(uint16_t);
constexpr float kActivationMost = 32767.0f;

// sum + a[2i] * b[2i] + a[2i + 1] * b[2i + 1] in lane i.
INLINE Int add_pairs(Int sum, Shorts a, Shorts b) {
#if defined(__AVX512VNNI__)
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
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

// How a format keeps the 512 weights of a block, read `kAtOnce` pairs at a time.
struct Int8 {
    static constexpr size_t kBlockBytes = 512, kAtOnce = 1;
    static constexpr int kLow = -128, kOffset = 0;
    static constexpr float kFactors[] = {1.0f, 1.008f};  // of the scale that fits the largest weight
    static void read(const uint8_t* from, size_t step, int part, Shorts* pairs) {
        pairs[0] = widen(*(const SignedBytes*)(from + step * 2 * kPanel + part * kBytes / 2));
    }
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
    static constexpr int kLow = -8, kOffset = 8;
    static constexpr float kFactors[] = {1.07f, 1.0f, 0.93f, 0.86f};
    static void read(const uint8_t* from, size_t step, int part, Shorts* pairs) {
        const Shorts wide =
            widen(*(const PlainBytes*)(from + step * 2 * kPanel + part * kBytes / 2));
        pairs[0] = wide & 15;
        pairs[1] = wide >> 4;
    }
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
struct IntWeights {
    // For each block a token has the sum of its values times the stored offset, and its pairs.
    using Word = int32_t;
    static constexpr size_t kInputs = kBlockInputs, kSpan = 1 + kPairs;
    static constexpr size_t kStep = kScaleBytes + Stored::kBlockBytes;
    static constexpr bool kCompact = true;

    static const float* scales(const void* x) { return static_cast<const float*>(x); }
    static const int32_t* words(const void* x, size_t n) {
        return static_cast<const int32_t*>(x) + padded(n);
    }

    template <int P, int T>
    static void tile(const uint8_t* panels, size_t panel_bytes, const int32_t* x, size_t steps,
                     Sums sums, Ahead ahead) {
        if (!sums.resume)
            for (int p = 0; p < P; ++p)
                for (int t = 0; t < T; ++t)
                    store(sums.at + p * sums.stride + t * kPanel, splat(0.0f));
        for (size_t step = 0; step < steps; ++step) {
            Int sum[P][T][kParts];
#pragma GCC unroll 32
            for (int t = 0; t < T; ++t)
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                    for (int i = 0; i < kParts; ++i)
                        sum[p][t][i] = Stored::kOffset ? x[t] - Int{} : Int{};
            add_block<P, T>(sum, panels, panel_bytes, x + T, ahead);
            add_scaled<P, T>(sum, panels, panel_bytes, sums);
            x += kSpan * T;
            panels += kStep;
            ahead.from += ahead.step;
        }
    }

    template <int P, int T>
    INLINE_MEMBER void add_block(Int (&sum)[P][T][kParts], const uint8_t* panels,
                                 size_t panel_bytes, const int32_t* x, Ahead ahead) {
#pragma GCC unroll 2
        for (size_t pair = 0; pair < kPairs; pair += Stored::kAtOnce) {
            Shorts w[P][kParts][Stored::kAtOnce];
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    Stored::read(panels + p * panel_bytes + kScaleBytes, pair / Stored::kAtOnce, i,
                                 w[p][i]);
            if (pair % 2 == 0)
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
                    __builtin_prefetch(
                        ahead.from + p * panel_bytes + pair * ahead.step / kPairs, 0,
                        fetches_near<T> ? 3 : 2);
#pragma GCC unroll 32
            for (size_t q = 0; q < Stored::kAtOnce; ++q)
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    const Shorts value = (Shorts)(x[(pair + q) * T + t] - Int{});
#pragma GCC unroll 32
                    for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                        for (int i = 0; i < kParts; ++i)
                            sum[p][t][i] = add_pairs(sum[p][t][i], w[p][i][q], value);
                }
        }
    }

    template <int P, int T>
    INLINE_MEMBER void add_scaled(const Int (&sum)[P][T][kParts], const uint8_t* panels,
                                  size_t panel_bytes, Sums sums) {
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i) {
                const Reg scale = Bf16::part(panels + p * panel_bytes, i);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t) {
                    float* at = sums.at + p * sums.stride + t * kPanel;
                    const Reg exact = __builtin_convertvector(sum[p][t][i], Reg);
                    store_part(at, i, reg_fma(exact, scale, load_part(at, i)));
                }
            }
    }

    static size_t blocks(size_t inputs) { return (inputs + kBlockInputs - 1) / kBlockInputs; }
    static size_t panel_bytes(size_t inputs) { return blocks(inputs) * kStep; }

    static void pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        for (size_t block = 0; block < blocks(inputs); ++block)
            for (size_t row = 0; row < kPanel; ++row) {
                float values[kBlockInputs] = {};
                const size_t first = block * kBlockInputs;
                for (size_t k = 0; row < rows && k < kBlockInputs && first + k < inputs; ++k)
                    values[k] = weights[row * inputs + first + k];
                pack_block(values, panel + block * kStep, row);
            }
    }

    static int nearest(float value, float scale) {
        const float number = scale != 0.0f ? __builtin_rintf(value / scale) : 0.0f;
        const float low = Stored::kLow, high = -1 - Stored::kLow;
        return static_cast<int>(number < low ? low : number > high ? high : number);
    }

    // The largest weight gets the number of largest size, or is cut where that serves the others.
    static void pack_block(const float* values, uint8_t* block, size_t row) {
        float edge = 0.0f;
        for (size_t k = 0; k < kBlockInputs; ++k)
            if (__builtin_fabsf(values[k]) > __builtin_fabsf(edge)) edge = values[k];
        uint16_t best = 0;
        double least = __builtin_inf();
        for (const float factor : Stored::kFactors) {
            const uint16_t stored = Bf16::to(edge / Stored::kLow * factor);
            const float scale = Bf16::from(stored);
            double error = 0.0;
            for (size_t k = 0; k < kBlockInputs; ++k) {
                const double missed = double{values[k]} - double{scale} * nearest(values[k], scale);
                error += missed * missed;
            }
            if (error < least) best = stored;
            least = error < least ? error : least;
        }
        ((uint16_t*)block)[row] = best;
        for (size_t k = 0; k < kBlockInputs; ++k)
            Stored::put(block + kScaleBytes, k / 2, row, k % 2,
                        nearest(values[k], Bf16::from(best)));
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        for (size_t k = 0; k < inputs; ++k) {
            const uint8_t* block = panel + k / kBlockInputs * kStep;
            const size_t at = k % kBlockInputs;
            const int value = Stored::get(block + kScaleBytes, at / 2, lane, at % 2);
            out[k] = static_cast<float>(value) * Bf16::from(((const uint16_t*)block)[lane]) * scale;
        }
    }

    static size_t arranged_bytes(size_t n, size_t inputs) {
        return (padded(n) + room(tiling(n)) * blocks(inputs) * kSpan) * sizeof(int32_t);
    }

    // Part `part` of `parts` takes its share of the blocks; each finds the rows' scales itself.
    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs, void* out,
                        size_t part, size_t parts) {
        const Tiling tiles = tiling(n);
        const size_t all = blocks(inputs);
        const size_t begin = all * part / parts, end = all * (part + 1) / parts;
        float* scales = static_cast<float*>(out);
        for (size_t tile = 0; tile < tiles.count; ++tile) {
            const size_t first = tile * tiles.width, tokens = tiles.tokens(tile);
            const size_t width = tiles.width_of(tile);
            int32_t* words = static_cast<int32_t*>(out) + padded(n) + first * all * kSpan;
            for (size_t t = 0; t < width; ++t) {
                if (t >= tokens) {
                    for (size_t i = begin * kSpan; i < end * kSpan; ++i) words[i * width + t] = 0;
                    continue;
                }
                const float* row = rows + (first + t) * stride;
                const float most = largest_size(row, inputs);
                if (begin == 0) scales[first + t] = most / kActivationMost;
                const float inverse = most > 0.0f ? kActivationMost / most : 0.0f;
                for (size_t block = begin; block < end; ++block)
                    arrange_block(row, inputs, block, inverse, words + block * kSpan * width + t,
                                  width);
            }
        }
    }

    // One block of one token: the offset's sum, then the pairs, `width` words apart.
    static void arrange_block(const float* row, size_t inputs, size_t block, float inverse,
                              int32_t* to, size_t width) {
        alignas(64) float values[kBlockInputs];
        alignas(64) int32_t numbers[kBlockInputs];
        const size_t first = block * kBlockInputs;
        const size_t count = inputs - first < kBlockInputs ? inputs - first : kBlockInputs;
        for (size_t k = 0; k < kBlockInputs; ++k) values[k] = k < count ? row[first + k] : 0.0f;
        const F16 magic = splat(12582912.0f);  // adding it rounds to an integer
        for (size_t k = 0; k < kBlockInputs; k += kPanel) {
            const F16 rounded = (load(values + k) * splat(inverse) + magic) - magic;
            for (int i = 0; i < kParts; ++i)
                *(Int*)(numbers + k + i * kRegLanes) =
                    __builtin_convertvector(rounded.part[i], Int);
        }
        int32_t sum = 0;
        for (size_t pair = 0; pair < kPairs; ++pair) {
            const int32_t a = numbers[2 * pair], b = numbers[2 * pair + 1];
            sum += a + b;
            const uint32_t low = static_cast<uint32_t>(a) & 0xffff;
            to[(1 + pair) * width] = static_cast<int32_t>(low | static_cast<uint32_t>(b) << 16);
        }
        to[0] = -Stored::kOffset * sum;
    }

    static float largest_size(const float* row, size_t inputs) {
        F16 most = splat(0.0f);
        for (size_t k = 0; k < inputs; k += kPanel) {  // padding is zero
            const F16 value = load(row + k);
            most = max(most, max(value, splat(0.0f) - value));
        }
        return largest(most);
    }
};

static const FormatKernels int8_kernels = panel_kernels<IntWeights<Int8>>;
static const FormatKernels int4_kernels = panel_kernels<IntWeights<Int4>>;

}  // namespace

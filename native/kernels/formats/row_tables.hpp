// Codes of 2 to 6 bits that name numbers of a table for each row: lanes lie across inputs.
//
// A panel is sixteen rows, one behind the other, as the loader packs them: 2^b numbers in fp16, then the
// codes, see unit_codes.hpp. Weights become fp32, and so are activations and sums. Each output has four
// sums of sixteen lanes, for the four sixteens of a unit, whatever the number of tokens.
#pragma once

#include "kernels/formats/unit_rows.hpp"

namespace paceline {

namespace {

// Entries of a table of 2^b floats.
template <int kBits>
struct Lookup {
#if defined(__AVX512F__)
    static constexpr int kHeld = kBits <= 4 ? 1 : 1 << (kBits - 4);
    __m512 held[kHeld];
    explicit Lookup(const float* table) {
        for (int i = 0; i < kHeld; ++i) held[i] = _mm512_loadu_ps(table + 16 * i);
    }
    __attribute__((always_inline)) Reg operator()(Int codes) const {
        const auto at = (__m512i)codes;
        if constexpr (kHeld == 1) return (Reg)_mm512_maskz_permutexvar_ps(-1, at, held[0]);
        if constexpr (kHeld == 2) return (Reg)_mm512_permutex2var_ps(held[0], at, held[1]);
        if constexpr (kHeld == 4) {
            const __m512 low = _mm512_permutex2var_ps(held[0], at, held[1]);
            const __m512 high = _mm512_permutex2var_ps(held[2], at, held[3]);
            return (Reg)_mm512_mask_blend_ps(_mm512_test_epi32_mask(at, _mm512_set1_epi32(32)),
                                             low, high);
        }
    }
#else
    const float* table;
    explicit Lookup(const float* from) : table(from) {}
    __attribute__((always_inline)) Reg operator()(Int codes) const {
#if defined(__AVX2__)
        if constexpr (kBits <= 3)
            return (Reg)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
        if constexpr (kBits == 4) {
            const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
            const __m256 high =
                _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
            return (Reg)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
        }
#endif
        Reg out = {};
        for (int lane = 0; lane < kRegLanes; ++lane) out[lane] = table[codes[lane]];
        return out;
    }
#endif
};

template <int kBits>
struct RowTables {
    using Codes = UnitCodes<kBits>;
    static constexpr size_t kEntries = size_t{1} << kBits, kHeld = kEntries < kPanel ? kPanel : kEntries;
#if defined(__AVX512F__)
    static constexpr size_t kTogether = 6;  // tokens whose sums fit the registers
#else
    static constexpr size_t kTogether = 1;
#endif

    // Before the codes of a row.
    static size_t header(size_t, size_t) { return kEntries * sizeof(uint16_t); }

    // The table as floats; what is behind it is never named.
    static void read_table(const uint8_t* row, float* table) {
        for (size_t i = 0; i < kHeld; ++i) {
            uint16_t half = 0;
            if (i < kEntries) std::memcpy(&half, row + i * sizeof(half), sizeof(half));
            table[i] = Fp16::from(half);
        }
    }

    static const float* scales(const void*) { return nullptr; }

    // Sums of one row go to `out`, those of neighbouring tokens kPanel floats apart.
    static void multiply_row(const Product& job, const uint8_t* row, float* out) {
        alignas(64) float table[kHeld];
        read_table(row, table);
        const Lookup<kBits> lookup(table);
        const uint8_t* codes = row + header(job.inputs, job.group);
        const size_t stride = units_of(job.inputs) * kUnitInputs;
        const auto* x = static_cast<const float*>(job.x);
        in_tiles<kTogether>(job.n, [&](auto t, size_t token) {
            add_row<decltype(t)::value>(lookup, codes, x + token * stride, stride,
                                        out + token * kPanel);
        });
    }

    template <int T>
    static void add_row(const Lookup<kBits>& lookup, const uint8_t* codes, const float* x,
                        size_t stride, float* out) {
        constexpr int S = static_cast<int>(kSixteens);
        Reg sum[T][S][kParts] = {};
        for (size_t k = 0; k < stride; k += kUnitInputs, codes += Codes::kBytes) {
            __builtin_prefetch(codes + kRowFetch, 0, 3);
#pragma GCC unroll 4
            for (int s = 0; s < S; ++s)
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i) {
                    const Reg weight = lookup(Codes::get(codes, s, i));
                    const float* at = x + k + static_cast<size_t>(s) * kPanel;
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t)
                        sum[t][s][i] = reg_fma(
                            weight, load_part(at + static_cast<size_t>(t) * stride, i),
                            sum[t][s][i]);
                }
        }
        for (int t = 0; t < T; ++t) {
            F16 all{};
            for (int i = 0; i < kParts; ++i)
                all.part[i] = (sum[t][0][i] + sum[t][1][i]) + (sum[t][2][i] + sum[t][3][i]);
            out[static_cast<size_t>(t) * kPanel] = paceline::sum(all);
        }
    }

    static void unpack_row(const uint8_t* row, size_t inputs, size_t group, float* out) {
        alignas(64) float table[kHeld];
        read_table(row, table);
        const uint8_t* codes = row + header(inputs, group);
        for (size_t k = 0; k < inputs; ++k) out[k] = table[code_at<kBits>(codes, k)];
    }

    static size_t arranged_bytes(size_t n, size_t inputs) {
        return n * units_of(inputs) * kUnitInputs * sizeof(float);
    }
    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs,
                        const int32_t* order, void* out, size_t part, size_t parts) {
        const size_t width = units_of(inputs) * kUnitInputs;
        for (size_t t = 0; t < n; ++t) {
            const float* row = rows + t * stride;
            float* to = static_cast<float*>(out) + t * width;
            for (size_t k = width * part / parts; k < width * (part + 1) / parts; ++k)
                to[k] = k >= inputs ? 0.0f : order ? row[order[k]] : row[k];
        }
    }
};

}  // namespace

}  // namespace paceline

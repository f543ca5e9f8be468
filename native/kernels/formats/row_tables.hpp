// Codes of 2 to 8 bits that name numbers of a table for each row: lanes lie across inputs.
//
// A panel is sixteen rows, one behind the other, as the loader packs them: 2^b numbers in fp16, then the
// codes, see unit_codes.hpp. Weights become fp32, and so are activations and sums. Each output has four
// sums of sixteen lanes, for the four sixteens of a unit, whatever the number of tokens.
#pragma once

#include "kernels/formats/unit_rows.hpp"

namespace paceline {

namespace {

#if defined(__AVX512F__)
// Weights of 32 inputs, two sixteens of a unit, by the numbers of a table that codes name. Up to five
// bits, registers hold sixteen floats each, whose places are the lowest four bits of a code; more bits
// choose the register. Above five bits they hold 32 halves each, and two of them are one instruction.
template <int kBits>
struct Lookup {
    static constexpr bool kFloats = kBits <= 5;
    using Codes = UnitCodes<kBits>;
    static constexpr int kHeld = kFloats ? 1 << (kBits % 2) : 1 << (kBits - 5);
    __m512i held[kHeld];

    explicit Lookup(const uint8_t* table) {
        if constexpr (!kFloats) {
            for (int i = 0; i < kHeld; ++i) held[i] = _mm512_loadu_si512(table + 64 * i);
        } else if constexpr (kBits >= 4) {
            for (int i = 0; i < kHeld; ++i) held[i] = (__m512i)Fp16::part(table + 32 * i, 0);
        } else {  // four floats, again and again
            const __m128i halves = kBits == 3 ? _mm_loadu_si128((const __m128i*)table)
                                              : _mm_loadl_epi64((const __m128i*)table);
            const __m512 all = _mm512_maskz_cvtph_ps(0xffff, _mm256_zextsi128_si256(halves));
            for (int i = 0; i < kHeld; ++i)
                held[i] = _mm512_castps_si512(_mm512_maskz_shuffle_f32x4(-1, all, all, 0x55 * i));
        }
    }

    template <int kPair>
    __attribute__((always_inline)) void weights(const uint8_t* unit, int, Reg (&to)[2]) const {
        if constexpr (kFloats)
            floats<kPair>(unit, to);
        else
            halves<kPair>(unit, to);
    }

private:
    // The lowest bits of codes are where they are; what is above them is not read.
    template <int kPair>
    __attribute__((always_inline)) void floats(const uint8_t* unit, Reg (&to)[2]) const {
        const Int bytes = widen_bytes(unit + (Codes::kFour ? kPair * static_cast<int>(kPanel) : 0), 0);
        constexpr int kShift = Codes::kFour ? 0 : 4 * kPair, kStep = Codes::kFour ? 4 : 2;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const auto at = (__m512i)(bytes >> (kShift + kStep * i));
            __m512i found = _mm512_maskz_permutexvar_epi32(-1, at, held[0]);
            if constexpr (kHeld == 2)
                found = _mm512_mask_permutexvar_epi32(
                    found, ones<uint16_t>(unit, 0, 2 * kPair + i), at, held[1]);
            to[i] = (Reg)found;
        }
    }

    template <int kPair>
    __attribute__((always_inline)) void halves(const uint8_t* unit, Reg (&to)[2]) const {
        const __m256i bytes = _mm256_cvtepu8_epi16(
            _mm_loadu_si128((const __m128i*)(unit + kPair * static_cast<int>(kPanel))));
        const __m512i low = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(bytes),
                                                     _mm256_srli_epi16(bytes, 4), 1);
        const __m256i pairs =
            _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(unit + 2 * kPanel)));
        const __m256i first = kPair ? pairs : _mm256_slli_epi16(pairs, 4);
        const __m512i high = _mm512_maskz_inserti64x4(
            0xff, _mm512_castsi256_si512(first), _mm256_srli_epi16(first, 2), 1);
        // Bits of `low` where the mask has them, or else of `high`; those above the sixth are not read.
        const __m512i at = _mm512_ternarylogic_epi64(_mm512_set1_epi16(15), low, high, 0xca);
        __m512i found[kHeld / 2];
#pragma GCC unroll 4
        for (int i = 0; i < kHeld / 2; ++i)
            found[i] = _mm512_permutex2var_epi16(held[2 * i], at, held[2 * i + 1]);
#pragma GCC unroll 2
        for (int one = 0; one < Codes::kOnes; ++one) {
            const auto mask = ones<uint32_t>(unit, one, kPair);
#pragma GCC unroll 2
            for (int i = 0; i < kHeld / 2 >> (one + 1); ++i)
                found[i] = _mm512_mask_blend_epi16(mask, found[2 * i], found[2 * i + 1]);
        }
        to[0] = (Reg)_mm512_maskz_cvtph_ps(0xffff, half_of<0>(found[0]));
        to[1] = (Reg)_mm512_maskz_cvtph_ps(0xffff, half_of<1>(found[0]));
    }

    // A plain cast uses what compilers call uninitialized.
    template <int kHalf>
    INLINE_MEMBER __m256i half_of(__m512i all) {
        return _mm512_maskz_extracti64x4_epi64(0xf, all, kHalf);
    }

    // Part `part` of a plane of single bits, as many as `Mask` has.
    template <class Mask>
    INLINE_MEMBER Mask ones(const uint8_t* unit, int one, int part) {
        Mask mask;
        std::memcpy(&mask,
                    unit + Codes::kWide * 8 + one * 8 + part * static_cast<int>(sizeof(mask)),
                    sizeof(mask));
        return mask;
    }
};
#else
template <int kBits>
struct Lookup {
    using Codes = UnitCodes<kBits>;
    static constexpr size_t kEntries = size_t{1} << kBits;
    static constexpr size_t kHeld = kEntries < kPanel ? kPanel : kEntries;
    alignas(64) float table[kHeld];

    explicit Lookup(const uint8_t* from) {
        alignas(64) uint8_t halves[2 * kHeld] = {};
        std::memcpy(halves, from, 2 * kEntries);
        for (size_t i = 0; i < kHeld; i += kPanel)
            for (int part = 0; part < kParts; ++part)
                store_part(table + i, part, Fp16::part(halves + 2 * i, part));
    }

    template <int kPair>
    __attribute__((always_inline)) void weights(const uint8_t* unit, int part, Reg (&to)[2]) const {
        for (int i = 0; i < 2; ++i) to[i] = find(Codes::get(unit, 2 * kPair + i, part));
    }

private:
    __attribute__((always_inline)) Reg find(Int codes) const {
#if defined(__AVX2__)
        if constexpr (kBits <= 3)
            return (Reg)_mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)codes);
        if constexpr (kBits == 4) {
            const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)codes);
            const __m256 high =
                _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)codes);
            return (Reg)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
        }
#endif
        Reg out = {};
        for (int lane = 0; lane < kRegLanes; ++lane) out[lane] = table[codes[lane]];
        return out;
    }
};
#endif

template <int kBits>
struct RowTables {
    using Codes = UnitCodes<kBits>;
    static constexpr size_t kEntries = size_t{1} << kBits;
#if defined(__AVX512F__)
    static constexpr size_t kTogether = kBits <= 6 ? 6 : 3;  // tokens whose sums fit the registers
#else
    static constexpr size_t kTogether = 1;
#endif

    struct Plan {
        explicit Plan(const Product&) {}
    };

    // Before the codes of a row.
    static size_t header(size_t, size_t) { return kEntries * sizeof(uint16_t); }

    static const float* scales(const void*) { return nullptr; }

    // Sums of one row go to `out`, those of neighbouring tokens kPanel floats apart. Where many
    // small tiles use its weights, they are looked up once, some units at a time; sums are the same, to
    // the bit.
    static void multiply_row(const Product& job, const Plan&, const uint8_t* row, float* out,
                             float* spare) {
        const Lookup<kBits> lookup(row);
        const uint8_t* codes = row + header(job.inputs, job.group);
        const size_t units = units_of(job.inputs), stride = units * kUnitInputs;
        const auto* x = static_cast<const float*>(job.x);
        if (kTogether == kLargeTile || job.n <= kTogether) {
            in_tiles<kTogether>(job.n, [&](auto t, size_t token) {
                constexpr int T = decltype(t)::value;
                Reg sum[T][kSixteens][kParts] = {};
                add_units<T>(lookup, codes, units, x + token * stride, stride, sum);
                put_sums<T>(sum, out + token * kPanel);
            });
            return;
        }
        alignas(64) float weights[kChunk * kUnitInputs];
        for (size_t unit = 0; unit < units; unit += kChunk) {
            const size_t count = units - unit < kChunk ? units - unit : kChunk;
            look_up(lookup, codes + unit * Codes::kBytes, count, weights);
            in_tiles<kTogether>(job.n, [&](auto t, size_t token) {
                constexpr int T = decltype(t)::value;
                Reg sum[T][kSixteens][kParts] = {};
                float* kept = spare + token * kSpare;
                if (unit > 0) each_sum<T>([&](int t, int s, int i) INLINE_LAMBDA {
                    sum[t][s][i] = load_part(kept + (t * kSums + s) * kLanes, i);
                });
                const float* at = x + token * stride + unit * kUnitInputs;
                add_units<T>(Found{}, weights, count, at, stride, sum);
                if (unit + count == units) return put_sums<T>(sum, out + token * kPanel);
                each_sum<T>([&](int t, int s, int i) INLINE_LAMBDA {
                    store_part(kept + (t * kSums + s) * kLanes, i, sum[t][s][i]);
                });
            });
        }
    }
    static constexpr size_t kLargeTile = 6;  // looking up takes less time than multiplying
    static constexpr size_t kChunk = 16;  // units that are looked up together
    static constexpr size_t kSpare = kSixteens * kPanel;
    static constexpr int kSums = static_cast<int>(kSixteens);

    // Weights that have been looked up.
    struct Found {
        template <int kPair>
        __attribute__((always_inline)) void weights(const float* unit, int part,
                                                    Reg (&to)[2]) const {
            for (int i = 0; i < 2; ++i)
                to[i] = load_part(unit + (2 * kPair + i) * static_cast<int>(kPanel), part);
        }
    };
    static constexpr size_t unit_size(const uint8_t*) { return Codes::kBytes; }
    static constexpr size_t unit_size(const float*) { return kUnitInputs; }

    template <int T, class Use>
    INLINE_MEMBER void each_sum(Use&& use) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
            for (int s = 0; s < static_cast<int>(kSixteens); ++s)
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i) use(t, s, i);
    }

    static void look_up(const Lookup<kBits>& lookup, const uint8_t* codes, size_t units,
                        float* weights) {
        const auto put = [&](const Reg (&two)[2], int pair, int part) INLINE_LAMBDA {
            for (int i = 0; i < 2; ++i)
                store_part(weights + (2 * pair + i) * static_cast<int>(kPanel), part, two[i]);
        };
        for (size_t unit = 0; unit < units; ++unit, codes += Codes::kBytes, weights += kUnitInputs) {
            __builtin_prefetch(codes + kRowFetch, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) {
                Reg two[2];
                lookup.template weights<0>(codes, i, two);
                put(two, 0, i);
                lookup.template weights<1>(codes, i, two);
                put(two, 1, i);
            }
        }
    }

    template <int T, class From, class Unit>
    INLINE_MEMBER void add_units(const From& from, const Unit* at, size_t units, const float* x,
                                 size_t stride, Reg (&sum)[T][kSixteens][kParts]) {
        for (size_t unit = 0; unit < units; ++unit, at += unit_size(at), x += kUnitInputs) {
            if constexpr (sizeof(Unit) == 1) __builtin_prefetch(at + kRowFetch, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) {
                add_pair<0>(from, at, x, stride, i, sum);
                add_pair<1>(from, at, x, stride, i, sum);
            }
        }
    }

    template <int T>
    INLINE_MEMBER void put_sums(const Reg (&sum)[T][kSixteens][kParts], float* out) {
        for (int t = 0; t < T; ++t) {
            F16 all{};
            for (int i = 0; i < kParts; ++i)
                all.part[i] = (sum[t][0][i] + sum[t][1][i]) + (sum[t][2][i] + sum[t][3][i]);
            out[static_cast<size_t>(t) * kPanel] = fold(all);
        }
    }

    // Adds the products of two sixteens of a unit.
    template <int kPair, class From, class Unit, int T>
    INLINE_MEMBER void add_pair(const From& from, const Unit* unit, const float* x, size_t stride,
                                int part, Reg (&sum)[T][kSixteens][kParts]) {
        Reg weights[2];
        from.template weights<kPair>(unit, part, weights);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const int sixteen = 2 * kPair + i;
            const float* at = x + sixteen * static_cast<int>(kPanel);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
                sum[t][sixteen][part] =
                    reg_fma(weights[i], load_part(at + static_cast<size_t>(t) * stride, part),
                            sum[t][sixteen][part]);
        }
    }

    static void unpack_row(const uint8_t* row, size_t inputs, size_t group, float* out) {
        const uint8_t* codes = row + header(inputs, group);
        for (size_t k = 0; k < inputs; ++k) {
            uint16_t half;
            std::memcpy(&half, row + code_at<kBits>(codes, k) * 2, sizeof(half));
            out[k] = Fp16::from(half);
        }
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

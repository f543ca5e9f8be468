// Codes of 2 to 4 bits that name levels, whose scales are shared by 4, 8, 16, 32 or 64 inputs: lanes
// lie across inputs.
//
// A panel is sixteen rows, one behind the other, as the loader packs them:
//   a number in fp16, and 2^b levels of 8 bits
//   for each group a byte; its scale is the number times the byte, rounded to fp16. Or, with kHalves, an
//   fp16 scale for each group, times the number
//   the codes, see unit_codes.hpp
// A token's row becomes int16 numbers with one scale. Sums of four neighbouring inputs are exact, in
// int32; sixteen such sums of a unit are scaled and added in fp32, in order, each in its lane.
#pragma once

#include "kernels/formats/integer_pairs.hpp"
#include "kernels/formats/pair_codes.hpp"
#include "kernels/formats/unit_rows.hpp"

namespace paceline {

namespace {

constexpr size_t kFours = kUnitInputs / 4;   // sums of a unit
constexpr size_t kUnitWords = 2 * kFours;    // of a token: pairs of inputs 0 and 2, then of 1 and 3
constexpr size_t kChunkUnits = 16;           // units whose scales are decoded together
constexpr size_t kChunkScales = kChunkUnits * kFours;

// How a token's row is laid out: its scale, those of all tokens first; then its units.
struct FourActivations {
    static const float* scales(const void* x) { return static_cast<const float*>(x); }
    static const int32_t* words(const void* x, size_t n) {
        return static_cast<const int32_t*>(x) + padded(n);
    }
    static size_t arranged_bytes(size_t n, size_t inputs) {
        return (padded(n) + n * units_of(inputs) * kUnitWords) * sizeof(int32_t);
    }

    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs,
                        const int32_t* order, void* out, size_t part, size_t parts) {
        const size_t units = units_of(inputs);
        for (size_t t = 0; t < n; ++t) {
            const float* row = rows + t * stride;
            const float size = largest_size(row, inputs);
            if (part == 0) static_cast<float*>(out)[t] = size / kMaxActivation;
            const float inverse = size > 0.0f ? kMaxActivation / size : 0.0f;
            int32_t* to = static_cast<int32_t*>(out) + padded(n) + t * units * kUnitWords;
            for (size_t unit = units * part / parts; unit < units * (part + 1) / parts; ++unit)
                arrange_unit(row, inputs, order, unit, inverse, to + unit * kUnitWords);
        }
    }

    static void arrange_unit(const float* row, size_t inputs, const int32_t* order, size_t unit,
                             float inverse, int32_t* to) {
        alignas(64) int32_t numbers[kUnitInputs] = {};
        for (size_t block = 2 * unit; block < 2 * unit + 2 && block < blocks_of(inputs); ++block)
            round_block(row, inputs, order, block, inverse,
                        numbers + (block - 2 * unit) * kBlockInputs);
        for (size_t four = 0; four < kFours; ++four) {
            const int32_t* from = numbers + 4 * four;
            to[four] = as_pair(from[0], from[2]);
            to[kFours + four] = as_pair(from[1], from[3]);
        }
    }
};

template <int kBits, bool kHalves>
struct FineGroups : FourActivations {
    using Codes = UnitCodes<kBits>;
    static constexpr size_t kLevels = size_t{1} << kBits, kScaleBytes1 = kHalves ? 2 : 1;
    static constexpr size_t kScalesAt = 2 + kLevels;
    static constexpr size_t kTogether = kParts == 1 ? 6 : kParts == 2 ? 3 : 1;

    static size_t groups_of(size_t inputs, size_t group) { return (inputs + group - 1) / group; }
    static size_t header(size_t inputs, size_t group) {
        return kScalesAt + groups_of(inputs, group) * kScaleBytes1;
    }
    static float number_of(const uint8_t* row) {
        uint16_t half;
        std::memcpy(&half, row, sizeof(half));
        return Fp16::from(half);
    }

    // Scales of groups first .. first + count - 1 and of up to kPanel others; zero behind the last of
    // all. Sixteen are read at a time; behind the last one are the codes of the row, which are fewer
    // bytes than that in a row of one unit.
    static void read_scales(const uint8_t* row, size_t first, size_t count, size_t groups,
                            float* to) {
        const uint8_t* from = row + kScalesAt + first * kScaleBytes1;
        uint8_t all[kPanel * kScaleBytes1] = {};
        if (kHalves && first == 0 && groups <= kFours) {
            std::memcpy(all, from, groups * kScaleBytes1);
            from = all;
        }
        const Reg number = number_of(row) - Reg{};
        const size_t real = groups - first < count ? groups - first : count;
        for (size_t i = 0; i < real; i += kPanel)
            for (int part = 0; part < kParts; ++part) {
                if constexpr (kHalves) {
                    store_part(to + i, part, Fp16::part(from + 2 * i, part) * number);
                } else {
                    const Reg steps =
                        __builtin_convertvector(widen_bytes(from + i, part), Reg);
                    store_part(to + i, part, Fp16::rounded(steps * number));
                }
            }
        for (size_t i = real; i < count + kPanel; ++i) to[i] = 0.0f;
    }

    // The scales of a unit's sixteen sums, from those of its groups.
    struct Plan {
        size_t fours;  // of a group
        Int place[kParts];
        explicit Plan(const Product& job) : fours(job.group / 4) {
            alignas(64) int32_t places[kFours];
            for (size_t i = 0; i < kFours; ++i) places[i] = static_cast<int32_t>(i / fours);
            for (int i = 0; i < kParts; ++i) place[i] = (Int)load_part((const float*)places, i);
        }
        size_t groups() const { return kFours / fours; }
        __attribute__((always_inline)) Reg spread(const float* scales, int part) const {
            if (fours == 1) return load_part(scales, part);
#if defined(__AVX512F__)
            return (Reg)_mm512_maskz_permutexvar_ps(-1, (__m512i)place[part],
                                                    _mm512_loadu_ps(scales));
#elif defined(__AVX2__)
            return (Reg)_mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), (__m256i)place[part]);
#else
            Reg out = {};
            for (int lane = 0; lane < kRegLanes; ++lane) out[lane] = scales[place[part][lane]];
            return out;
#endif
        }
    };

    // Levels at the beginning of each sixteen of a register; others are never named.
    static Int read_levels(const uint8_t* row) {
#if defined(__AVX512F__)
        return (Int)_mm512_maskz_broadcast_i32x4(-1, _mm_loadu_si128((const __m128i*)(row + 2)));
#elif defined(__AVX2__)
        return (Int)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(row + 2)));
#else
        return (Int)load_part((const float*)(row + 2), 0);
#endif
    }

    static constexpr size_t kSpare = 0;
    static void multiply_row(const Product& job, const Plan& plan, const uint8_t* row, float* out,
                             float*) {
        const int32_t* x = words(job.x, job.n);
        const size_t stride = units_of(job.inputs) * kUnitWords;
        in_tiles<kTogether>(job.n, [&](auto t, size_t token) {
            add_row<decltype(t)::value>(job, plan, row, x + token * stride, stride,
                                        out + token * kPanel);
        });
    }

    template <int T>
    static void add_row(const Product& job, const Plan& plan, const uint8_t* row, const int32_t* x,
                        size_t stride, float* out) {
        alignas(64) float scales[kChunkScales + kPanel];
        const Int levels = read_levels(row);
        const uint8_t* codes = row + header(job.inputs, job.group);
        const size_t groups = groups_of(job.inputs, job.group), units = units_of(job.inputs);
        Reg sum[T][kParts] = {};
        for (size_t unit = 0; unit < units; ++unit, codes += Codes::kBytes, x += kUnitWords) {
            const size_t place = unit % kChunkUnits * plan.groups();
            if (unit % kChunkUnits == 0) {
                const size_t left = units - unit < kChunkUnits ? units - unit : kChunkUnits;
                read_scales(row, unit * plan.groups(), left * plan.groups(), groups, scales);
            }
            __builtin_prefetch(codes + kRowFetch, 0, 3);
#pragma GCC unroll 4
            for (int i = 0; i < kParts; ++i) {
                const Int weights = shuffle_bytes(levels, UnitBytes<kBits>::get(codes, i));
                const Shorts even = (Shorts)weights << 8 >> 8, odd = (Shorts)weights >> 8;
                const Reg scale = plan.spread(scales + place, i);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const auto* at = (const float*)(x + static_cast<size_t>(t) * stride);
                    Int exact = add_pairs(Int{}, even, (Shorts)load_part(at, i));
                    exact = add_pairs(exact, odd, (Shorts)load_part(at + kFours, i));
                    sum[t][i] = reg_fma(__builtin_convertvector(exact, Reg), scale, sum[t][i]);
                }
            }
        }
        for (int t = 0; t < T; ++t) {
            F16 all{};
            for (int i = 0; i < kParts; ++i) all.part[i] = sum[t][i];
            out[static_cast<size_t>(t) * kPanel] = fold(all);
        }
    }

    static void unpack_row(const uint8_t* row, size_t inputs, size_t group, float* out) {
        const uint8_t* codes = row + header(inputs, group);
        for (size_t k = 0; k < inputs; ++k) {
            const uint8_t* at = row + kScalesAt + k / group * kScaleBytes1;
            float scale;
            if constexpr (kHalves)
                scale = number_of(at) * number_of(row);
            else
                scale = Fp16::from(Fp16::to(number_of(row) * static_cast<float>(*at)));
            const auto level = static_cast<int8_t>(row[2 + code_at<kBits>(codes, k)]);
            out[k] = static_cast<float>(level) * scale;
        }
    }
};

}  // namespace

}  // namespace paceline

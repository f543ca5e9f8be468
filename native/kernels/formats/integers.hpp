// Weights as integers, in blocks of 32 inputs with one scale each and, in some formats, a zero
// point: what a checkpoint of another kind than GGUF is rounded to, or kept in.
//
// A panel lies as that of a GGUF type with such blocks; see blocks.hpp. In formats with scales in
// fp16 a factor for each of its sixteen rows comes first.
#pragma once

#include "kernels/formats/blocks.hpp"

namespace paceline {

namespace {

// Scales in bf16.
struct Bf16Scales : Bf16 {
    static constexpr bool kRowFactors = false;
    static float row_factor(const float*, size_t) { return 1.0f; }
};

// Scales in fp16 times a power of two for each row: those of any file in fp16, and those in bf16
// that lie within some thirty powers of two.
struct Fp16Scales : Fp16 {
    static constexpr bool kRowFactors = true;
    static float row_factor(const float* scales, size_t count) {
        float largest = 0.0f;
        bool exact = true;
        for (size_t i = 0; i < count; ++i) {
            largest = max_of(largest, __builtin_fabsf(scales[i]));
            exact = exact && from(to(scales[i])) == scales[i];
        }
        if (exact || !(largest >= 0x1p-110f)) return 1.0f;
        uint32_t bits;
        std::memcpy(&bits, &largest, sizeof(bits));
        bits = (bits & 0x7f800000) - (15u << 23);  // so that the largest is 2^15 to 2^16
        std::memcpy(&largest, &bits, sizeof(bits));
        return largest;
    }
    static float max_of(float a, float b) { return a > b ? a : b; }
};

// How weights are rounded. Tried: parts of the scale that gives the largest weight the number of
// largest size; then as often the scale that fits the numbers best.
template <int kBits>
struct Rounding;
template <>
struct Rounding<8> {
    static constexpr float kFactors[] = {1.0f, 1.008f};
    static constexpr int kRounds = 1;
};
template <>
struct Rounding<4> {
    static constexpr float kFactors[] = {1.12f, 1.03f, 0.94f, 0.85f, 0.76f};
    static constexpr int kRounds = 2;
};

// Integers of kBits bits: signed from kLow to -1 - kLow, stored with -kLow added; or, with zero
// points, codes from 0 to kTop less a zero point of 0 to 255 for each row of a block.
template <int kStoredBits, class ScalesOf, bool kZeroPoints>
struct Integers {
    using Scales = ScalesOf;
    static constexpr int kBits = kStoredBits;
    static constexpr bool kZeros = kZeroPoints, kRowFactors = Scales::kRowFactors;
    static constexpr int kLow = -(1 << (kBits - 1)), kTop = (1 << kBits) - 1;
    // As a GGUF type.
    static constexpr int kAdded = kZeros ? 0 : kCodeOffset + kLow;
    using Codes = BlockCodes<kBits, kAdded>;
    static constexpr size_t kInputs = kBlockInputs;
    static constexpr size_t kFileBytes = sizeof(uint16_t) + kZeros + kBits * kBlockInputs / 8;
    static constexpr int kScales = 1;
    static constexpr bool kMinima = kZeros;
    static constexpr Field kHeader[] = {{Holds::half_words, 0, 1}, {Holds::bytes, 2, kZeros}};
    static constexpr const uint8_t* table() { return nullptr; }
    static void codes(const uint8_t* unit, uint8_t* out) {
        std::memcpy(out, unit + sizeof(uint16_t) + kZeros, kBlockInputs);
    }
    template <class Scale, class Minimum>
    INLINE_MEMBER void scales(const uint8_t* unit, int part, Scale scale, Minimum minimum) {
        const Reg size = Scales::part(unit, part);
        scale(0, 0, size);
        if constexpr (kZeros)
            minimum(0, 0, -size * to_float(widen_bytes(unit + sizeof(uint16_t) * kPanel, part)));
    }
};

template <class Type>
struct IntegerWeights : BlockWeights<Type> {
    using Blocks = BlockWeights<Type>;
    using Scales = typename Type::Scales;
    using Numbers = uint8_t[kPanel][kBlockInputs];
    static constexpr bool kZeros = Type::kZeros;
    static constexpr size_t kZerosAt = sizeof(uint16_t) * kPanel;

    static uint8_t* unit_of(uint8_t* panel, size_t block) {
        return panel + Blocks::kPanelHeader + block * Blocks::kUnitBytes;
    }
    static void set_factor(uint8_t* panel, size_t row, float factor) {
        if constexpr (Type::kRowFactors) ((float*)panel)[row] = factor;
    }

    // Writes the codes of a block of sixteen rows.
    static void put(const Numbers& codes, uint8_t* unit) {
        auto* to = (uint32_t*)(unit + Blocks::kCodesAt);
        for (size_t row = 0; row < kPanel; ++row) {
            uint32_t words[Type::Codes::kWords];
            Type::Codes::pack(codes[row], words);
            for (size_t word = 0; word < Type::Codes::kWords; ++word)
                to[word * kPanel + row] = words[word];
        }
    }

    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        for (size_t row = 0; row < kPanel; ++row) set_factor(panel, row, 1.0f);
        for (size_t block = 0; block < Blocks::units(inputs); ++block) {
            float values[kBlockInputs][kPanel] = {};
            const size_t first = block * kBlockInputs;
            for (size_t row = 0; row < rows; ++row)
                for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k)
                    values[k][row] = weights[row * inputs + first + k];
            if constexpr (kZeros)
                pack_between(values, unit_of(panel, block));
            else
                pack_block(values, unit_of(panel, block));
        }
        return true;
    }

    // Sixteen rows at once. Each tries some scales, and after each the one that fits its numbers
    // best, and keeps that of the smallest squared error.
    static void pack_block(const float (&values)[kBlockInputs][kPanel], uint8_t* unit) {
        F16 edge = splat(0.0f), best = edge, smallest = splat(__builtin_inff());
        for (const auto& value : values)
            edge = where_less(size(edge), size(paceline::load(value)), paceline::load(value), edge);
        for (const float factor : Rounding<Type::kBits>::kFactors) {
            F16 scale = Scales::rounded(edge * splat(1.0f / Type::kLow) * splat(factor));
            for (int round = 0; round < Rounding<Type::kBits>::kRounds; ++round) {
                const F16 inverse = inverse_of(scale);
                F16 error = splat(0.0f), cross = error, square = error;
                for (const auto& value : values) {
                    const F16 number = nearest(paceline::load(value), inverse);
                    const F16 missed = paceline::load(value) - number * scale;
                    error = error + missed * missed;
                    cross = cross + paceline::load(value) * number;
                    square = square + number * number;
                }
                best = where_less(error, smallest, scale, best);
                smallest = min(error, smallest);
                scale = Scales::rounded(cross / max(square, splat(1.0f)));
            }
        }
        float scales[kPanel], numbers[kPanel];
        store(scales, best);
        for (size_t row = 0; row < kPanel; ++row) ((uint16_t*)unit)[row] = Scales::to(scales[row]);
        Numbers codes;
        for (size_t k = 0; k < kBlockInputs; ++k) {
            store(numbers, nearest(paceline::load(values[k]), inverse_of(best)));
            for (size_t row = 0; row < kPanel; ++row)
                codes[row][k] = static_cast<uint8_t>(static_cast<int>(numbers[row]) - Type::kLow);
        }
        put(codes, unit);
    }

    // Each row's codes lie between its smallest and its largest weight, or zero.
    static void pack_between(const float (&values)[kBlockInputs][kPanel], uint8_t* unit) {
        Numbers codes;
        for (size_t row = 0; row < kPanel; ++row) {
            float low = 0.0f, high = 0.0f;
            for (const auto& value : values) {
                low = value[row] < low ? value[row] : low;
                high = value[row] > high ? value[row] : high;
            }
            const uint16_t stored = Scales::to((high - low) / Type::kTop);
            const float scale = Scales::from(stored);
            const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            const int zero = code(-low * inverse);
            ((uint16_t*)unit)[row] = stored;
            unit[kZerosAt + row] = static_cast<uint8_t>(zero);
            for (size_t k = 0; k < kBlockInputs; ++k)
                codes[row][k] = static_cast<uint8_t>(
                    code(values[k][row] * inverse + static_cast<float>(zero)));
        }
        put(codes, unit);
    }
    static int code(float value) {
        const float top = Type::kTop;
        const float inside = value < 0.0f ? 0.0f : value > top ? top : value;
        return static_cast<int>(inside + 0.5f);
    }

    static F16 size(F16 value) { return max(value, splat(0.0f) - value); }
    // Of a block without weights, zero.
    static F16 inverse_of(F16 scale) {
        return where_less(size(scale), splat(1e-30f), splat(0.0f), splat(1.0f) / scale);
    }
    static F16 nearest(F16 value, F16 inverse) {
        const F16 magic = splat(12582912.0f);  // adding it rounds to an integer
        const F16 number = min(max(value * inverse, splat(Type::kLow)), splat(-1 - Type::kLow));
        return (number + magic) - magic;
    }

    static bool holds(const GroupedRows& from) {
        if (from.bits > Type::kBits) return false;
        for (size_t row = 0; row < from.rows; ++row) {
            const float* scales = from.scales + row * from.groups;
            const float factor = Scales::row_factor(scales, from.groups);
            for (size_t group = 0; group < from.groups; ++group) {
                if (Scales::from(Scales::to(scales[group] / factor)) * factor != scales[group])
                    return false;
                const int zero = from.zero(row, group), top = (1 << from.bits) - 1 - zero;
                if constexpr (kZeros) {
                    if (zero > 255) return false;
                } else {
                    if (-zero < Type::kLow || top > -1 - Type::kLow) return false;
                }
            }
        }
        return true;
    }

    static void load(const GroupedRows& from, uint8_t* panel) {
        std::memset(panel, 0, Blocks::panel_bytes(from.inputs));
        float factors[kPanel] = {};
        for (size_t row = 0; row < from.rows; ++row) {
            factors[row] = Scales::row_factor(from.scales + row * from.groups, from.groups);
            set_factor(panel, row, factors[row]);
        }
        for (size_t block = 0; block < Blocks::units(from.inputs); ++block) {
            uint8_t* unit = unit_of(panel, block);
            const auto group = static_cast<size_t>(from.block_groups[block]);
            const size_t first = block * kBlockInputs;
            Numbers codes = {};
            for (size_t row = 0; row < from.rows; ++row) {
                const int zero = from.zero(row, group);
                const float scale = from.scales[row * from.groups + group];
                ((uint16_t*)unit)[row] = Scales::to(scale / factors[row]);
                if constexpr (kZeros) unit[kZerosAt + row] = static_cast<uint8_t>(zero);
                const uint8_t* stored = from.codes + row * from.inputs + first;
                for (size_t k = 0; k < kBlockInputs && first + k < from.inputs; ++k)
                    codes[row][k] =
                        static_cast<uint8_t>(stored[k] - (kZeros ? 0 : zero + Type::kLow));
            }
            put(codes, unit);
        }
    }
};

template <class Type>
constexpr FormatKernels integer_format(const char* name, const char* head) {
    using W = IntegerWeights<Type>;
    FormatKernels kernels = block_format<Type>(name);
    kernels.head = head;
    kernels.stored_row_bytes = nullptr;
    kernels.load_blocks = nullptr;
    kernels.pack = W::pack;
    kernels.holds = W::holds;
    kernels.load = W::load;
    return kernels;
}

}  // namespace

}  // namespace paceline

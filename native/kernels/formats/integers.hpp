// Weights as integers, in blocks of 32 inputs with one scale each. Sums over a block are exact, in
// int32; blocks are added in fp32, in order.
//
// A panel holds a factor for each of its sixteen rows, in some formats; then for each block the
// scales of sixteen rows, their zero points in some formats, and their weights.
#pragma once

#include "kernels/formats/integer_pairs.hpp"
#include "kernels/formats/scales.hpp"

namespace paceline {

namespace {

constexpr size_t kScaleBytes = kPanel * sizeof(uint16_t);

// How the 512 weights of a block are kept; see PairProducts. Signed numbers run from kLow to
// -1 - kLow; with zero points they are unsigned codes.
struct EightBits {
    static constexpr size_t kBlockBytes = 512, kAtOnce = 1;
    static constexpr int kBits = 8, kEach = 2;
    static Shorts pair(Shorts read, size_t) { return read; }
    static void put(uint8_t* block, size_t pair, size_t row, size_t half, int stored) {
        block[pair * 2 * kPanel + row * 2 + half] = static_cast<uint8_t>(stored);
    }
    static int get(const uint8_t* block, size_t pair, size_t row, size_t half) {
        return block[pair * 2 * kPanel + row * 2 + half];
    }
};

// Two neighbouring pairs share bytes: the even one in the low half.
struct FourBits {
    static constexpr size_t kBlockBytes = 256, kAtOnce = 2;
    static constexpr int kBits = 4, kEach = 2;
    static Shorts load(const uint8_t* from, int part) {
        return widen(*(const PlainBytes*)(from + part * kBytes / 2));
    }
    static Shorts pair(Shorts read, size_t q) { return q ? read >> 4 : read & 15; }
    static void put(uint8_t* block, size_t pair, size_t row, size_t half, int stored) {
        uint8_t& byte = block[pair / 2 * 2 * kPanel + row * 2 + half];
        byte = static_cast<uint8_t>(pair % 2 ? (byte & 15) | stored << 4 : (byte & 240) | stored);
    }
    static int get(const uint8_t* block, size_t pair, size_t row, size_t half) {
        const uint8_t byte = block[pair / 2 * 2 * kPanel + row * 2 + half];
        return pair % 2 ? byte >> 4 : byte & 15;
    }
};

struct Int8 : EightBits {
    static constexpr bool kZeros = false;
    static constexpr size_t kLead = 0;
    static constexpr int kLow = -128;
    // Tried: parts of the scale that gives the largest weight the number of largest size.
    static constexpr float kFactors[] = {1.0f, 1.008f};
    static constexpr int kRounds = 1;
    static Shorts load(const uint8_t* from, int part) {
        return widen(*(const SignedBytes*)(from + part * kBytes / 2));
    }
    static int encode(int value) { return value & 255; }
    static int decode(int stored) { return static_cast<int8_t>(stored); }
};

// Stored with 8 added; a token's sum over the block, times -8, takes it off again.
struct Int4 : FourBits {
    static constexpr bool kZeros = false;
    static constexpr size_t kLead = 1;
    static constexpr int kLow = -8;
    static constexpr float kFactors[] = {1.12f, 1.03f, 0.94f, 0.85f, 0.76f};
    static constexpr int kRounds = 2;
    static int encode(int value) { return value + 8; }
    static int decode(int stored) { return stored - 8; }
    static int32_t lead(int32_t sum) { return -8 * sum; }
};

// Unsigned codes, less a zero point of 0 to 255 for each row of a block. It is taken off by one
// more pair of products: (-z, -64 z) times the low and high bits of the token's sum.
template <class Bits>
struct WithZeros : Bits {
    static constexpr bool kZeros = true;
    static constexpr size_t kLead = 1;
    static constexpr int kTop = (1 << Bits::kBits) - 1;
    static int32_t lead(int32_t sum) {
        const int32_t high = sum >> 6, low = sum & 63;
        return static_cast<int32_t>(static_cast<uint32_t>(low) |
                                    static_cast<uint32_t>(high) << 16);
    }
    static Shorts factors(const uint8_t* zeros, int part) {
        const Int zero = widen_bytes(zeros, part);
        return (Shorts)((-zero & 0xffff) | -zero << 22);
    }
    static int encode(int value) { return value; }
    static int decode(int stored) { return stored; }
};

struct UnsignedBytes : EightBits {
    static Shorts load(const uint8_t* from, int part) {
        return widen(*(const PlainBytes*)(from + part * kBytes / 2));
    }
};
using Int8Zero = WithZeros<UnsignedBytes>;
using Int4Zero = WithZeros<FourBits>;

template <class Stored, class Scales>
struct IntWeights : PairProducts<Stored> {
    using Products = PairProducts<Stored>;
    using Products::blocks, Products::kHeld, Products::kLead, Products::kSpan;
    static constexpr bool kZeros = Stored::kZeros;
    static constexpr size_t kHeader = Scales::kHeader;
    static constexpr size_t kWeightsAt = kScaleBytes + (kZeros ? kPanel : 0);  // in a block
    static constexpr size_t kStep = kWeightsAt + Stored::kBlockBytes;

    static F16 total(const float* sums, const uint8_t* panel) {
        if constexpr (kHeader > 0)
            return paceline::load(sums) * paceline::load((const float*)panel);
        return paceline::load(sums);
    }

    template <int P, int T>
    static void tile(const uint8_t* panels, size_t panel_bytes, const int32_t* x, size_t steps,
                     Sums sums, Ahead ahead) {
        panels += kHeader;
        Reg total[P][T][kParts];
        each<P, T>([&](int p, int t, int i) {
            total[p][t][i] = sums.resume ? load_part(place(sums, p, t), i) : Reg{};
            if (!kHeld) store_part(place(sums, p, t), i, total[p][t][i]);
        });
        for (size_t step = 0; step < steps; ++step) {
            Int sum[P][T][kParts];
            begin_block<P, T>(sum, panels + kScaleBytes, panel_bytes, x);
            Products::template add_block<P, T>(sum, panels + kWeightsAt, panel_bytes,
                                               x + kLead * T, 0, ahead);
            each<P, 1>([&](int p, int, int i) {
                const Reg scale = Scales::part(panels + p * panel_bytes, i);
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

    // What the sums of a block start from.
    template <int P, int T>
    INLINE_MEMBER void begin_block(Int (&sum)[P][T][kParts], const uint8_t* zeros,
                                   size_t panel_bytes, const int32_t* x) {
        if constexpr (kZeros) {
            each<P, 1>([&](int p, int, int i) {
                const Shorts factors = Stored::factors(zeros + p * panel_bytes, i);
#pragma GCC unroll 32
                for (int t = 0; t < T; ++t)
                    sum[p][t][i] = add_pairs(Int{}, factors, (Shorts)(x[t] - Int{}));
            });
        } else {
            (void)zeros, (void)panel_bytes;
            each<P, T>([&](int p, int t, int i) { sum[p][t][i] = kLead ? x[t] - Int{} : Int{}; });
        }
    }

    static size_t panel_bytes(size_t inputs) { return kHeader + blocks(inputs) * kStep; }
    static uint8_t* block_of(uint8_t* panel, size_t block) {
        return panel + kHeader + block * kStep;
    }
    static const uint8_t* block_of(const uint8_t* panel, size_t block) {
        return panel + kHeader + block * kStep;
    }

    static bool pack(const float* weights, size_t rows, size_t inputs, uint8_t* panel) {
        for (size_t row = 0; kHeader > 0 && row < kPanel; ++row) ((float*)panel)[row] = 1.0f;
        for (size_t block = 0; block < blocks(inputs); ++block) {
            float values[kBlockInputs][kPanel] = {};
            const size_t first = block * kBlockInputs;
            for (size_t row = 0; row < rows; ++row)
                for (size_t k = 0; k < kBlockInputs && first + k < inputs; ++k)
                    values[k][row] = weights[row * inputs + first + k];
            if constexpr (kZeros)
                pack_between(values, block_of(panel, block));
            else
                pack_block(values, block_of(panel, block));
        }
        return true;
    }

    // Sixteen rows at once. Each tries some scales, and after each the one that fits its numbers
    // best, and keeps that of the smallest squared error.
    static void pack_block(const float (&values)[kBlockInputs][kPanel], uint8_t* block) {
        F16 edge = splat(0.0f), best = edge, smallest = splat(__builtin_inff());
        for (const auto& value : values)
            edge = where_less(size(edge), size(paceline::load(value)), paceline::load(value), edge);
        for (const float factor : Stored::kFactors) {
            F16 scale = Scales::rounded(edge * splat(1.0f / Stored::kLow) * splat(factor));
            for (int round = 0; round < Stored::kRounds; ++round) {
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
        for (size_t row = 0; row < kPanel; ++row)
            ((uint16_t*)block)[row] = Scales::to(scales[row]);
        for (size_t k = 0; k < kBlockInputs; ++k) {
            store(numbers, nearest(paceline::load(values[k]), inverse_of(best)));
            for (size_t row = 0; row < kPanel; ++row)
                put(block, k, row, static_cast<int>(numbers[row]));
        }
    }

    // Each row's codes lie between its smallest and its largest weight, or zero.
    static void pack_between(const float (&values)[kBlockInputs][kPanel], uint8_t* block) {
        for (size_t row = 0; row < kPanel; ++row) {
            float low = 0.0f, high = 0.0f;
            for (const auto& value : values) {
                low = value[row] < low ? value[row] : low;
                high = value[row] > high ? value[row] : high;
            }
            const uint16_t stored = Scales::to((high - low) / Stored::kTop);
            const float scale = Scales::from(stored);
            const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            const int zero = code(-low * inverse);
            ((uint16_t*)block)[row] = stored;
            block[kScaleBytes + row] = static_cast<uint8_t>(zero);
            for (size_t k = 0; k < kBlockInputs; ++k)
                put(block, k, row, code(values[k][row] * inverse + static_cast<float>(zero)));
        }
    }
    static int code(float value) {
        const float top = Stored::kTop;
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
        const F16 number = min(max(value * inverse, splat(Stored::kLow)), splat(-1 - Stored::kLow));
        return (number + magic) - magic;
    }

    static bool holds(const GroupedRows& from) {
        if (from.bits > Stored::kBits || from.steps) return false;
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
                    if (-zero < Stored::kLow || top > -1 - Stored::kLow) return false;
                }
            }
        }
        return true;
    }

    static void load(const GroupedRows& from, uint8_t* panel) {
        std::memset(panel, 0, panel_bytes(from.inputs));
        for (size_t row = 0; row < from.rows; ++row) {
            const float* scales = from.scales + row * from.groups;
            const float factor = Scales::row_factor(scales, from.groups);
            if constexpr (kHeader > 0) ((float*)panel)[row] = factor;
            for (size_t at = 0; at < blocks(from.inputs); ++at) {
                uint8_t* block = block_of(panel, at);
                const auto group = static_cast<size_t>(from.block_groups[at]);
                const int zero = from.zero(row, group);
                ((uint16_t*)block)[row] = Scales::to(scales[group] / factor);
                if constexpr (kZeros) block[kScaleBytes + row] = static_cast<uint8_t>(zero);
                const size_t first = at * kBlockInputs;
                for (size_t k = 0; k < kBlockInputs && first + k < from.inputs; ++k)
                    put(block, k, row,
                        from.codes[row * from.inputs + first + k] - (kZeros ? 0 : zero));
            }
        }
    }

    static void put(uint8_t* block, size_t k, size_t row, int value) {
        Stored::put(block + kWeightsAt, k / 2, row, k % 2, Stored::encode(value));
    }
    // The number that is multiplied with the scale.
    static int get(const uint8_t* block, size_t k, size_t row) {
        const int value = Stored::decode(Stored::get(block + kWeightsAt, k / 2, row, k % 2));
        return kZeros ? value - block[kScaleBytes + row] : value;
    }

    static void copy(const uint8_t* panel, size_t lane, size_t inputs, uint8_t* to,
                     size_t to_lane) {
        if constexpr (kHeader > 0) ((float*)to)[to_lane] = ((const float*)panel)[lane];
        for (size_t block = 0; block < blocks(inputs); ++block) {
            const uint8_t* from = block_of(panel, block);
            uint8_t* out = block_of(to, block);
            ((uint16_t*)out)[to_lane] = ((const uint16_t*)from)[lane];
            if constexpr (kZeros) out[kScaleBytes + to_lane] = from[kScaleBytes + lane];
            for (size_t k = 0; k < kBlockInputs; ++k)
                Stored::put(out + kWeightsAt, k / 2, to_lane, k % 2,
                            Stored::get(from + kWeightsAt, k / 2, lane, k % 2));
        }
    }

    static void unpack(const uint8_t* panel, size_t lane, size_t inputs, float scale, float* out) {
        float factor = 1.0f;
        if constexpr (kHeader > 0) factor = ((const float*)panel)[lane];
        for (size_t k = 0; k < inputs; ++k) {
            const uint8_t* block = block_of(panel, k / kBlockInputs);
            const auto value = static_cast<float>(get(block, k % kBlockInputs, lane));
            const float size = Scales::from(((const uint16_t*)block)[lane]) * factor;
            out[k] = value * size * scale;
        }
    }
};

}  // namespace

}  // namespace paceline

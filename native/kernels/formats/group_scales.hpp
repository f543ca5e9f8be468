// How the scales of groups are stored in a panel of `kPanel` rows, in front of their codes.
//
// A layout says
//   bytes(groups)       of a panel
//   holds(rows)         whether it holds what a file has, to the bit
//   load(rows, row, groups, to)   puts the scales of one row there
//   copy(groups, from, lane, to, to_lane)   one row to another panel
//   decode(groups, from, first, count, to)  scales and minima of blocks first .. first + count - 1
//   offset(rows, row, group)      what is added to a code when it is stored
//   levels(groups, from)          what codes name, of the first panel; or null
// All decode to code * scale + minimum.
#pragma once

#include "kernels/formats/block_codes.hpp"
#include "kernels/formats/scales.hpp"
#include "kernels/sparse_group.hpp"

namespace paceline {

namespace {

// Groups of a row.
struct GroupCount {
    size_t blocks, groups;  // blocks of a group

    GroupCount(size_t inputs, size_t group)
        : blocks(scale_blocks(group)), groups((blocks_of(inputs) + blocks - 1) / blocks) {}
};

INLINE void copy_lane(size_t size, size_t count, const uint8_t* from, size_t lane, uint8_t* to,
                      size_t to_lane) {
    for (size_t i = 0; i < count; ++i)
        std::memcpy(to + (i * kPanel + to_lane) * size, from + (i * kPanel + lane) * size, size);
}

// Calls use(group, part), which returns scale and minimum, for each group of some blocks, and writes
// them for each block. Minima are divided by -kCodeOffset, as BlockScales wants them.
struct ScaleAndMinimum {
    Reg scale, minimum;
};
template <class Use>
INLINE void each_group(size_t group_blocks, size_t first, size_t count, BlockScales& to, Use&& use) {
    for (int part = 0; part < kParts; ++part) {
        size_t group = first / group_blocks, left = group_blocks - first % group_blocks;
        for (size_t block = 0; block < count; ++group, left = group_blocks) {
            const ScaleAndMinimum found = use(group, part);
            for (; left > 0 && block < count; --left, ++block) {
                store_part(to.scales + block * kPanel, part, found.scale);
                store_part(to.minima + block * kPanel, part, found.minimum);
            }
        }
    }
}

// An fp16 scale of each group, times a power of two for each row: [groups][16], then exponents.
// Codes are signed, stored with half the range added.
template <int kBits>
struct PlainScales {
    static const uint8_t* levels(GroupCount, const uint8_t*) { return nullptr; }
    static constexpr int kHalf = 1 << (kBits - 1);
    static constexpr bool kLevels = false;
    static constexpr bool kRounds = kBits == 4 || kBits == 8;  // whether floats can be rounded to it
    static size_t bytes(GroupCount of) { return of.groups * kPanel * 2 + kPanel; }

    static bool holds(const GroupedRows& from) {
        return holds_scales(from, [&](size_t row, size_t group) {
            const int zero = from.zero(row, group), top = (1 << from.bits) - 1 - zero;
            return zero <= kHalf && top < kHalf;
        });
    }
    // Whether scales are kept, and `fits` is true for all groups.
    template <class Fits>
    INLINE_MEMBER bool holds_scales(const GroupedRows& from, Fits&& fits) {
        if (from.bits > kBits || from.steps) return false;
        for (size_t row = 0; row < from.rows; ++row) {
            const float* scales = from.scales + row * from.groups;
            const float factor = Fp16Scales::row_factor(scales, from.groups);
            for (size_t group = 0; group < from.groups; ++group) {
                const float scale = scales[group];
                if (Fp16::from(Fp16::to(scale / factor)) * factor != scale) return false;
                if (!fits(row, group)) return false;
            }
        }
        return true;
    }

    static int offset(const GroupedRows& from, size_t row, size_t group) {
        return kHalf - from.zero(row, group);
    }
    static void load(const GroupedRows& from, size_t row, GroupCount of, uint8_t* to) {
        put_scales(from.scales + row * from.groups, row, of, to);
    }
    static void put_scales(const float* scales, size_t row, GroupCount of, uint8_t* to) {
        const float factor = Fp16Scales::row_factor(scales, of.groups);
        for (size_t group = 0; group < of.groups; ++group)
            ((uint16_t*)to)[group * kPanel + row] = Fp16::to(scales[group] / factor);
        to[of.groups * kPanel * 2 + row] = static_cast<uint8_t>(exponent_of(factor));
    }
    // Of a power of two.
    static int exponent_of(float factor) {
        uint32_t bits;
        std::memcpy(&bits, &factor, sizeof(bits));
        return static_cast<int>(bits >> 23) - 127;
    }

    static void copy(GroupCount of, const uint8_t* from, size_t lane, uint8_t* to, size_t to_lane) {
        copy_lane(2, of.groups, from, lane, to, to_lane);
        copy_lane(1, 1, from + of.groups * kPanel * 2, lane, to + of.groups * kPanel * 2, to_lane);
    }

    static void decode(GroupCount of, const uint8_t* from, size_t first, size_t count,
                       BlockScales& to) {
        Reg factors[kParts];
        row_factors(from + of.groups * kPanel * 2, factors);
        each_group(of.blocks, first, count, to, [&](size_t group, int part) INLINE_LAMBDA {
            const Reg scale = Fp16::part(from + group * kPanel * 2, part) * factors[part];
            return ScaleAndMinimum{scale, scale * (static_cast<float>(kHalf) / kCodeOffset)};
        });
    }
    INLINE_MEMBER void row_factors(const uint8_t* exponents, Reg (&to)[kParts]) {
        for (int part = 0; part < kParts; ++part) {
            const Int bits = widen_bytes(exponents, part) << 24 >> 24;
            to[part] = (Reg)((bits + 127) << 23);
        }
    }
};

// The same with zero points: of up to four bits two in a byte, the first in the low half.
template <int kBits>
struct ZeroScales {
    static constexpr bool kLevels = false;
    static constexpr bool kRounds = false;
    using Plain = PlainScales<kBits>;
    static const uint8_t* levels(GroupCount, const uint8_t*) { return nullptr; }
    static constexpr size_t kEach = kBits <= 4 ? 2 : 1;  // zero points in a byte
    static size_t zero_bytes(GroupCount of) { return (of.groups + kEach - 1) / kEach; }
    static size_t bytes(GroupCount of) { return Plain::bytes(of) + zero_bytes(of) * kPanel; }

    static bool holds(const GroupedRows& from) {
        return Plain::holds_scales(from, [&](size_t row, size_t group) {
            return from.zero(row, group) < 1 << kBits;
        });
    }
    static int offset(const GroupedRows&, size_t, size_t) { return 0; }
    static void load(const GroupedRows& from, size_t row, GroupCount of, uint8_t* to) {
        Plain::load(from, row, of, to);
        put_zeros(from, row, of, to + Plain::bytes(of));
    }
    static void put_zeros(const GroupedRows& from, size_t row, GroupCount of, uint8_t* to) {
        for (size_t group = 0; group < of.groups; ++group)
            to[group / kEach * kPanel + row] |=
                static_cast<uint8_t>(from.zero(row, group) << group % kEach * 4);
    }
    INLINE_MEMBER Reg zero(const uint8_t* zeros, size_t group, int part) {
        const Int both = widen_bytes(zeros + group / kEach * kPanel, part);
        return to_float(kEach == 2 ? both >> splat_word(static_cast<int32_t>(group % 2 * 4)) & 15 : both);
    }
    static void copy(GroupCount of, const uint8_t* from, size_t lane, uint8_t* to, size_t to_lane) {
        Plain::copy(of, from, lane, to, to_lane);
        copy_lane(1, zero_bytes(of), from + Plain::bytes(of), lane, to + Plain::bytes(of), to_lane);
    }
    static void decode(GroupCount of, const uint8_t* from, size_t first, size_t count,
                       BlockScales& to) {
        Reg factors[kParts];
        Plain::row_factors(from + of.groups * kPanel * 2, factors);
        const uint8_t* zeros = from + Plain::bytes(of);
        each_group(of.blocks, first, count, to, [&](size_t group, int part) INLINE_LAMBDA {
            const Reg scale = Fp16::part(from + group * kPanel * 2, part) * factors[part];
            return ScaleAndMinimum{scale, scale * zero(zeros, group, part) * (1.0f / kCodeOffset)};
        });
    }
};

// Numbers of six bits, four to three bytes: low halves of two, of two more, and the high two bits of
// all four.
struct SixBits {
    static size_t bytes(size_t groups) { return (groups + 3) / 4 * 3; }  // of a row
    static void put(uint8_t* to, size_t row, size_t group, int value) {
        to += group / 4 * 3 * kPanel + row;
        const size_t at = group % 4;
        to[at / 2 * kPanel] |= static_cast<uint8_t>((value & 15) << at % 2 * 4);
        to[2 * kPanel] |= static_cast<uint8_t>(value >> 4 << at * 2);
    }
    INLINE_MEMBER Reg get(const uint8_t* from, size_t group, int part) {
        from += group / 4 * 3 * kPanel;
        const size_t at = group % 4;
        const Int low = widen_bytes(from + at / 2 * kPanel, part) >> splat_word(static_cast<int32_t>(at % 2 * 4)) & 15;
        const Int high = widen_bytes(from + 2 * kPanel, part) >> splat_word(static_cast<int32_t>(at * 2)) & 3;
        return to_float(low | high << 4);
    }
};

enum class Kind { signed_, zeros, levels };

// Scales in two grains: of each row a number in fp16, of each group how often it is taken, in six
// bits; the product is rounded to fp16. Then zero points, or sixteen levels with kCodeOffset added.
template <int kBits, Kind kKind>
struct NestedScales {
    static constexpr bool kLevels = kKind == Kind::levels;
    static constexpr bool kRounds = false;
    static constexpr int kHalf = 1 << (kBits - 1), kLimit = 64;
    using Zeros = ZeroScales<kBits>;

    static size_t steps_at() { return kPanel * 2; }
    static size_t end(GroupCount of) { return steps_at() + SixBits::bytes(of.groups) * kPanel; }
    static size_t bytes(GroupCount of) {
        if (kKind == Kind::zeros) return end(of) + Zeros::zero_bytes(of) * kPanel;
        return end(of) + (kKind == Kind::levels ? kPanel : 0);
    }
    // Sixteen bytes that codes name.
    static const uint8_t* levels(GroupCount of, const uint8_t* panel) {
        return kKind == Kind::levels ? panel + end(of) : nullptr;
    }

    static bool holds(const GroupedRows& from) {
        if (from.bits > kBits || !from.steps) return false;
        if ((from.levels != nullptr) != (kKind == Kind::levels)) return false;
        for (size_t row = 0; row < from.rows; ++row)
            if (Fp16::from(Fp16::to(from.scales[row])) != from.scales[row]) return false;
        for (size_t i = 0; i < from.rows * from.groups; ++i) {
            if (from.steps[i] >= kLimit) return false;
            if (kKind == Kind::levels) continue;
            const int zero = from.zero(0, i), top = (1 << from.bits) - 1 - zero;
            const bool fits = kKind == Kind::zeros ? zero < 1 << kBits
                                                    : zero <= kHalf && top < kHalf;
            if (!fits) return false;
        }
        return true;
    }
    static int offset(const GroupedRows& from, size_t row, size_t group) {
        return kKind == Kind::signed_ ? kHalf - from.zero(row, group) : 0;
    }
    static void load(const GroupedRows& from, size_t row, GroupCount of, uint8_t* to) {
        ((uint16_t*)to)[row] = Fp16::to(from.scales[row]);
        for (size_t group = 0; group < of.groups; ++group)
            SixBits::put(to + steps_at(), row, group, from.steps[row * of.groups + group]);
        if (kKind == Kind::zeros) Zeros::put_zeros(from, row, of, to + end(of));
        if (kKind == Kind::levels)
            for (int code = 0; code < 1 << from.bits; ++code)
                to[end(of) + static_cast<size_t>(code)] =
                    static_cast<uint8_t>(from.levels[code] + kCodeOffset);
    }
    static void copy(GroupCount of, const uint8_t* from, size_t lane, uint8_t* to, size_t to_lane) {
        copy_lane(2, 1, from, lane, to, to_lane);
        copy_lane(1, SixBits::bytes(of.groups), from + steps_at(), lane, to + steps_at(), to_lane);
        if (kKind == Kind::zeros)
            copy_lane(1, Zeros::zero_bytes(of), from + end(of), lane, to + end(of), to_lane);
        if (kKind == Kind::levels) std::memcpy(to + end(of), from + end(of), kPanel);
    }
    static void decode(GroupCount of, const uint8_t* from, size_t first, size_t count,
                       BlockScales& to) {
        each_group(of.blocks, first, count, to, [&](size_t group, int part) INLINE_LAMBDA {
            const Reg scale = Fp16::rounded(Fp16::part(from, part) *
                                            SixBits::get(from + steps_at(), group, part));
            if (kKind == Kind::zeros)
                return ScaleAndMinimum{
                    scale, scale * Zeros::zero(from + end(of), group, part) * (1.0f / kCodeOffset)};
            const float half = kKind == Kind::levels ? kCodeOffset : kHalf;
            return ScaleAndMinimum{scale, scale * (half / kCodeOffset)};
        });
    }
};

template <int kBits>
using NestedPlain = NestedScales<kBits, Kind::signed_>;
template <int kBits>
using NestedZeros = NestedScales<kBits, Kind::zeros>;
template <int kBits>
using NestedLevels = NestedScales<kBits, Kind::levels>;

}  // namespace

}  // namespace paceline

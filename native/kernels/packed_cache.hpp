// Keys and values in 4 or 3 bits, as in KIVI: keys for each channel over 32 positions, values for
// each position over 32 channels (Liu et al., KIVI, arXiv 2402.02750, section 3).
//
// A block of 64 positions holds two groups of keys, then a group of values for every 32 channels:
//   keys    [2]:      scales [K], minima [K], codes [K / run][words][2][16 positions]
//   values  [D / 32]: scales [64], minima [64], codes [64 / run][words][2][16 channels]
// K is D, padded to 32. Scales and minima are fp16; a number is code * scale + minimum. A word of
// 32 bits holds codes of one lane; a run is 8 codes in one word, or 32 codes in three.
//
// Positions are rounded once 32 of them are committed. Until then they are rows in fp16, sixteen
// to a page: keys [D][16], then values [D / 16][16][16].
#pragma once

#include "kernels/packed.hpp"

// Some of its functions are for other caches.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#include "kernels/attention.hpp"
#pragma GCC diagnostic pop

namespace paceline {

namespace {

constexpr size_t kGroupPanels = kCacheGroup / kPanel;

template <int kBits>
struct Codes;

template <>
struct Codes<4> {
    static constexpr size_t kRun = 8, kWords = 1;
    INLINE_MEMBER Int code(const Int (&words)[kWords], size_t k) {
        return words[0] >> static_cast<int>(4 * k);
    }
    static void put(uint32_t* words, size_t, size_t k, uint32_t code) {
        words[0] |= code << (4 * k);
    }
    static uint32_t get(const uint32_t* words, size_t, size_t k) {
        return words[0] >> (4 * k) & 15;
    }
};

// Ten codes to a word; the last two codes lie in the two bits that each word has left.
template <>
struct Codes<3> {
    static constexpr size_t kRun = 32, kWords = 3;
    INLINE_MEMBER Int code(const Int (&words)[kWords], size_t k) {
        if (k < 30) return words[k / 10] >> static_cast<int>(3 * (k % 10));
        const Int low = words[k == 30 ? 0 : 2] >> 30, high = words[1] >> static_cast<int>(k);
        return (low & 3) | (high & 1) << 2;
    }
    static void put(uint32_t* words, size_t stride, size_t k, uint32_t code) {
        if (k < 30) {
            words[k / 10 * stride] |= code << (3 * (k % 10));
            return;
        }
        words[(k == 30 ? 0 : 2) * stride] |= (code & 3) << 30;
        words[stride] |= (code >> 2) << k;
    }
    static uint32_t get(const uint32_t* words, size_t stride, size_t k) {
        if (k < 30) return words[k / 10 * stride] >> (3 * (k % 10)) & 7;
        return words[(k == 30 ? 0 : 2) * stride] >> 30 | (words[stride] >> k & 1) << 2;
    }
};

template <int kBits>
struct PackedBlock {
    using Code = Codes<kBits>;
    static constexpr int kTop = (1 << kBits) - 1;
    static constexpr size_t kLine = kGroupPanels * kPanel;  // words for two panels

    static size_t code_bytes(size_t inputs) {
        return inputs / Code::kRun * Code::kWords * kLine * sizeof(uint32_t);
    }
    // Of two panels with `inputs` scales and minima.
    static size_t group_bytes(size_t inputs) {
        return 2 * inputs * sizeof(uint16_t) + code_bytes(inputs);
    }
    static size_t bytes(size_t dim) {
        const size_t whole = whole_groups(dim);
        return kCacheBlock / kCacheGroup * group_bytes(whole) +
               whole / kCacheGroup * group_bytes(kCacheBlock);
    }
    static size_t keys_at(size_t dim, size_t group) { return group * group_bytes(whole_groups(dim)); }
    static size_t values_at(size_t dim, size_t group) {
        return keys_at(dim, kCacheBlock / kCacheGroup) + group * group_bytes(kCacheBlock);
    }
};

// Two panels of numbers in groups, and their `inputs` scales and minima.
template <int kBits>
struct PackedPanels {
    const uint16_t *scales, *minima;
    const uint8_t* codes;
    PackedPanels(const uint8_t* from, size_t inputs)
        : scales((const uint16_t*)from),
          minima(scales + inputs),
          codes((const uint8_t*)(minima + inputs)) {}
};

// Codes in every lane as floats.
template <int kBits>
INLINE Reg decode(Int code) {
    constexpr int kMask = (1 << kBits) - 1;
#if defined(__AVX512F__)  // the lowest four bits choose
    Reg codes = {};
    for (int i = 0; i < kRegLanes; ++i) codes[i] = static_cast<float>(i & kMask);
    return (Reg)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)code, (__m512)codes);
#else
    return __builtin_convertvector(code & kMask, Reg);
#endif
}

INLINE F16 half_floats(const uint16_t* from) {
    EACH_PART(Fp16::read((const uint8_t*)from, i, 0));
}

// P panels of codes, from panel `first` of the two on, times T rows of `x`, `stride` apart:
// `sums` [P][T][16] grow by it. Scales and minima are applied by the caller.
template <int kBits, int P, int T>
INLINE void multiply_codes(const uint8_t* codes, size_t first, size_t inputs, const float* x,
                           size_t stride, Sums sums, const uint8_t* ahead) {
    using Code = Codes<kBits>;
    constexpr size_t kLine = PackedBlock<kBits>::kLine;
    Reg sum[P][T][kParts];
    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
        sum[p][t][i] = sums.resume ? load_part(place(sums, p, t), i) : Reg{};
    });
    const uint32_t* words = (const uint32_t*)codes + first * kPanel;
    for (size_t run = 0; run < inputs; run += Code::kRun) {
        Int w[P][kParts][Code::kWords];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i)
#pragma GCC unroll 32
                for (size_t word = 0; word < Code::kWords; ++word)
                    w[p][i][word] =
                        (Int)load_part((const float*)(words + word * kLine + p * kPanel), i);
#pragma GCC unroll 32
        for (size_t word = 0; word < Code::kWords; ++word) {
            __builtin_prefetch(ahead, 0, 3);
            __builtin_prefetch(ahead + 64, 0, 3);
            ahead += kLine * sizeof(uint32_t);
        }
#pragma GCC unroll 32
        for (size_t k = 0; k < Code::kRun; ++k) {
            Reg number[P][kParts];
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    number[p][i] = decode<kBits>(Code::code(w[p][i], k));
#pragma GCC unroll 32
            for (int t = 0; t < T; ++t) {
                const Reg value = x[static_cast<size_t>(t) * stride + k] - Reg{};
#pragma GCC unroll 32
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                    for (int i = 0; i < kParts; ++i)
                        sum[p][t][i] = reg_fma(number[p][i], value, sum[p][t][i]);
            }
        }
        words += Code::kWords * kLine;
        x += Code::kRun;
    }
    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
        store_part(place(sums, p, t), i, sum[p][t][i]);
    });
}

// Two panels in groups, or the first one, times T rows of `x` [T][stride]: with
// number = code * scale + minimum, x times the scale goes into the product with codes, and x times
// the minimum, summed, is one number for all lanes. `scaled` has room for [T][inputs].
template <int kBits, int T>
INLINE void multiply_packed(const uint8_t* from, size_t count, size_t scales, size_t inputs,
                            const float* x, size_t stride, float* scaled, Sums sums,
                            const uint8_t* ahead) {
    const PackedPanels<kBits> panels(from, scales);
    for (const uint8_t* end = ahead + (panels.codes - from); ahead < end; ahead += 64)
        __builtin_prefetch(ahead, 0, 3);
    F16 shift[T];
    for (F16& each_shift : shift) each_shift = splat(0.0f);
    for (size_t k = 0; k < inputs; k += kPanel) {
        const F16 scale = half_floats(panels.scales + k), minimum = half_floats(panels.minima + k);
        for (int t = 0; t < T; ++t) {
            const F16 value = load(x + static_cast<size_t>(t) * stride + k);
            store(scaled + static_cast<size_t>(t) * inputs + k, value * scale);
            shift[t] = fma(value, minimum, shift[t]);
        }
    }
    for (int t = 0; t < T; ++t) {
        const F16 whole = splat(sum(shift[t]));
        for (size_t p = 0; p < count; ++p) {
            float* at = place(sums, static_cast<int>(p), t);
            store(at, sums.resume ? load(at) + whole : whole);
        }
    }
    sums.resume = true;
    if constexpr (2 * T <= kSums)
        if (count == 2)
            return multiply_codes<kBits, 2, T>(panels.codes, 0, inputs, scaled, inputs, sums, ahead);
    for (size_t panel = 0; panel < count; ++panel) {
        multiply_codes<kBits, 1, T>(panels.codes, panel, inputs, scaled, inputs, sums, ahead);
        sums.at += sums.stride;
    }
}

}  // namespace

}  // namespace paceline

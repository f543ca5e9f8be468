// Coarse logits: products with a copy of the head in 4 bits, and a bound of what each one misses.
// Compiled once for each instruction set, as kernels.cpp.
//
// A panel holds sixteen rows:
//   a factor of scales and a factor of errors for each row, floats
//   for each block of 32 inputs the scales of sixteen rows, then the errors, bytes
//   for each block four lines of codes; lane r of a line has eight codes of row r: of four
//   neighbouring inputs in the low halves of its bytes, of the next four in the high halves
// A weight is about (code - 7.5) * scale. An error bounds what a block of the product misses, over
// the size that the block of activations has.
#include "kernels/formats/integer_pairs.hpp"
#include "kernels/math.hpp"

namespace paceline {

namespace {

constexpr int kScreenWidth = kRegisters == 32 ? 8 : 4;  // tokens of the widest tile
constexpr size_t kScreenLines = 4;
constexpr size_t kScreenCodes = kScreenLines * 64;  // bytes of a block's codes
constexpr size_t kScreenFetched = 5;                // lines of a panel for each block
constexpr size_t kScreenAhead = 4;                  // panels
constexpr int kScreenTop = 255;                     // the largest scale and error
constexpr float kScreenMiddle = 7.5f;
constexpr float kScreenFactors[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f, 0.7f};  // tried, of the scale

INLINE size_t screen_head(size_t inputs) {
    return (2 * kPanel * sizeof(float) + 2 * kPanel * blocks_of(inputs) + 63) / 64 * 64;
}

static size_t screen_panel_bytes(size_t inputs) {
    return screen_head(inputs) + blocks_of(inputs) * kScreenCodes;
}

static size_t screen_width() { return kScreenWidth; }

// sum + the products of four neighbouring bytes: unsigned codes below 16, signed activations.
INLINE Int add_quads(Int sum, Int codes, Int x) {
#if defined(PACELINE_VNNI)
    return dot_quads(sum, codes, x);
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
    return sum + (Int)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
    return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(PACELINE_NEON_DOT)
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)x);
#else
    sum = add_pairs(sum, (Shorts)(codes & 0x00ff00ff), (Shorts)((Shorts)(x << 8) >> 8));
    return add_pairs(sum, (Shorts)(codes >> 8 & 0x00ff00ff), (Shorts)((Shorts)x >> 8));
#endif
}

// Sixteen rows of one tile of T tokens, whose words begin at `x`; the first is token `token`.
template <int T>
static void screen_tile(const ScreenProduct& job, size_t panel, size_t token) {
    const size_t blocks = blocks_of(job.inputs), row = panel * kPanel;
    const uint8_t* from = job.panels + panel * screen_panel_bytes(job.inputs);
    const uint8_t* scales = from + 2 * kPanel * sizeof(float);
    const uint8_t* errors = scales + kPanel * blocks;
    const uint8_t* codes = from + screen_head(job.inputs);
    const int32_t* words = job.x + kScreenWords * blocks * token;
    // Panels end before the machine foresees a stream, so the next ones are fetched.
    const size_t step = screen_panel_bytes(job.inputs) / blocks;
    const uint8_t* ahead = from + kScreenAhead * screen_panel_bytes(job.inputs);
    for (int part = 0; part < kParts; ++part) {
        Reg value[T] = {}, error[T] = {};
        const int32_t* x = words;
        for (size_t block = 0; block < blocks; ++block, x += kScreenWords * T) {
            Int sum[T] = {};
#pragma GCC unroll 8
            for (size_t line = 0; line < kScreenFetched; ++line)
                __builtin_prefetch(ahead + block * step + line * 64, 0, 2);
#pragma GCC unroll 4
            for (size_t line = 0; line < kScreenLines; ++line) {
                const uint8_t* at = codes + block * kScreenCodes + line * 64;
                const Int both = (Int)load_part((const float*)at, part);
                const Int low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    sum[t] = add_quads(sum[t], low, x[2 * line * T + t] - Int{});
                    sum[t] = add_quads(sum[t], high, x[(2 * line + 1) * T + t] - Int{});
                }
            }
            const auto* factors = (const float*)(x + 8 * T);
            const Reg scale = __builtin_convertvector(
                widen_bytes(scales + block * kPanel, part), Reg);
            const Reg missed = __builtin_convertvector(
                widen_bytes(errors + block * kPanel, part), Reg);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const Reg whole = __builtin_convertvector(sum[t], Reg) + factors[t];
                value[t] = reg_fma(whole, scale * factors[T + t], value[t]);
                error[t] = reg_fma(missed, factors[2 * T + t] - Reg{}, error[t]);
            }
        }
        const Reg row_scale = load_part((const float*)from, part);
        const Reg row_error = load_part((const float*)from + kPanel, part);
        alignas(64) float values[kRegLanes];
        alignas(64) uint32_t bounds[kRegLanes];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Reg product = value[t] * row_scale;
            const Reg size = (Reg)((Int)product & 0x7fffffff);
            // Rounding of these sums, of those that use the bound, and of what is too small.
            const Reg bound = error[t] * row_error * (1.0f + 0x1p-12f) + size * 0x1p-22f + 1e-30f;
            store_part(values, 0, product);
            *(Int*)bounds = (Int)bound + 0xffff;  // to be rounded up
            const size_t first = row + static_cast<size_t>(part * kRegLanes);
            const size_t at = (token + static_cast<size_t>(t)) * job.stride + first;
            const auto put = [&](size_t lanes) INLINE_LAMBDA {
                for (size_t i = 0; i < lanes; ++i) {
                    job.out[at + i] = values[i];
                    job.bounds[at + i] = static_cast<uint16_t>(bounds[i] >> 16);
                }
            };
            if (first + kRegLanes <= job.stride)
                put(kRegLanes);
            else if (first < job.stride)
                put(job.stride - first);
        }
    }
}

template <int T = kScreenWidth>
INLINE void screen_rest(const ScreenProduct& job, size_t panel, size_t token, size_t count) {
    if constexpr (T > 0) {
        if (count == static_cast<size_t>(T)) return screen_tile<T>(job, panel, token);
        screen_rest<T - 1>(job, panel, token, count);
    }
}

static void screen_multiply(const ScreenProduct& job, size_t first, size_t last) {
    for (size_t panel = first; panel < last; ++panel)
        for (size_t token = 0; token < job.n; token += kScreenWidth) {
            const size_t rest = job.n - token;
            screen_rest(job, panel, token, rest < kScreenWidth ? rest : kScreenWidth);
        }
}

INLINE F16 size_of(F16 value) { return max(value, splat(0.0f) - value); }
INLINE F16 nearest_whole(F16 value) {
    const F16 magic = splat(12582912.0f);
    return (value + magic) - magic;
}
INLINE F16 root(F16 value) {
    float lanes[kPanel];
    store(lanes, value);
    for (float& lane : lanes) lane = __builtin_sqrtf(lane);
    return load(lanes);
}
INLINE F16 code_of(F16 value, F16 inverse) {
    const F16 code = nearest_whole(value * inverse + splat(kScreenMiddle));
    return min(max(code, splat(0.0f)), splat(15.0f));
}

// The scale of a block of sixteen rows, in units of the row: that of the smallest squared error.
static F16 screen_scale(const float (&values)[kBlockInputs][kPanel]) {
    F16 edge = splat(0.0f), best = splat(0.0f), smallest = splat(__builtin_inff());
    for (const auto& value : values) edge = max(edge, size_of(load(value)));
    for (const float factor : kScreenFactors) {
        const F16 up = nearest_whole(edge * splat(factor * kScreenTop) + splat(0.499f));
        const F16 scale = min(max(up, splat(1.0f)), splat(kScreenTop));
        const F16 step = scale * splat(1.0f / (8 * kScreenTop)), inverse = splat(1.0f) / step;
        F16 error = splat(0.0f);
        for (const auto& value : values) {
            const F16 level = (code_of(load(value), inverse) - splat(kScreenMiddle)) * step;
            const F16 missed = load(value) - level;
            error = error + missed * missed;
        }
        best = where_less(error, smallest, scale, best);
        smallest = min(error, smallest);
    }
    return where_less(splat(0.0f), edge, best, splat(0.0f));
}

// Codes of a block, and its error for activations of size 1. See ScreenPack.
static F16 screen_block(const ScreenPack& job, const float (&values)[kBlockInputs][kPanel],
                        F16 scale, uint8_t* codes) {
    const F16 step = scale * splat(1.0f / (8 * kScreenTop));
    const F16 inverse = where_less(splat(0.0f), scale, splat(1.0f) / step, splat(0.0f));
    F16 missed = splat(0.0f), exact = missed, coarse = missed;
    for (size_t k = 0; k < kBlockInputs; ++k) {
        const F16 value = load(values[k]), code = code_of(value, inverse);
        const F16 level = (code - splat(kScreenMiddle)) * step, rest = value - level;
        missed = missed + rest * rest;
        exact = exact + value * value;
        coarse = coarse + level * level;
        float numbers[kPanel];
        store(numbers, code);
        uint8_t* line = codes + k / 8 * 64 + k % 4;
        for (size_t row = 0; row < kPanel; ++row)
            line[4 * row] = static_cast<uint8_t>(
                line[4 * row] | static_cast<uint8_t>(numbers[row]) << (k / 4 % 2 * 4));
    }
    const F16 own = root(exact), other = root(coarse);
    const F16 error = root(missed) * splat(1.0001f) + max(own, other) * splat(job.drift) +
                      (own + other) * splat(job.rounding + 1e-6f) + splat(1e-12f);
    return where_less(splat(0.0f), exact, error, splat(0.0f));
}

// The inputs of one block over the largest weight of each row.
INLINE void screen_values(const ScreenPack& job, size_t block, const float* inverse,
                          float (&values)[kBlockInputs][kPanel]) {
    const size_t first = block * kBlockInputs;
    std::memset(values, 0, sizeof(values));
    for (size_t row = 0; row < job.rows; ++row)
        for (size_t k = 0; k < kBlockInputs && first + k < job.inputs; ++k)
            values[k][row] = job.weights[row * job.inputs + first + k] * inverse[row];
}

static bool screen_pack(const ScreenPack& job, uint8_t* panel) {
    const size_t blocks = blocks_of(job.inputs);
    float largest_of[kPanel] = {}, inverse[kPanel] = {};
    for (size_t row = 0; row < job.rows; ++row) {
        float largest = 0.0f;
        for (size_t k = 0; k < job.inputs; ++k) {
            const float size = __builtin_fabsf(job.weights[row * job.inputs + k]);
            largest = size > largest ? size : largest;
        }
        if (largest > 0.0f && !(largest > 1e-15f && largest < 1e15f)) return false;
        largest_of[row] = largest;
        inverse[row] = largest > 0.0f ? 1.0f / largest : 0.0f;
    }
    uint8_t* scales = panel + 2 * kPanel * sizeof(float);
    uint8_t* errors = scales + kPanel * blocks;
    std::memset(panel, 0, screen_panel_bytes(job.inputs));
    float most[kPanel] = {}, lanes[kPanel];
    alignas(64) float values[kBlockInputs][kPanel];
    for (size_t block = 0; block < blocks; ++block) {
        screen_values(job, block, inverse, values);
        const F16 scale = screen_scale(values);
        store(lanes, scale);
        for (size_t row = 0; row < kPanel; ++row)
            scales[block * kPanel + row] = static_cast<uint8_t>(lanes[row]);
        uint8_t* codes = panel + screen_head(job.inputs) + block * kScreenCodes;
        const F16 error = screen_block(job, values, scale, codes);
        store(job.scratch + block * kPanel, error);
        store(most, max(load(most), error));
    }
    for (size_t block = 0; block < blocks; ++block)
        for (size_t row = 0; row < kPanel; ++row) {
            const float unit = most[row] / kScreenTop;
            const float error = unit > 0.0f ? job.scratch[block * kPanel + row] / unit : 0.0f;
            const int up = static_cast<int>(__builtin_ceilf(error * 1.00001f));
            errors[block * kPanel + row] =
                static_cast<uint8_t>(up > kScreenTop ? kScreenTop : up);
        }
    for (size_t row = 0; row < kPanel; ++row) {
        ((float*)panel)[row] = largest_of[row] / (8 * kScreenTop);
        ((float*)panel)[kPanel + row] = most[row] / kScreenTop * largest_of[row] * 1.0001f;
    }
    return true;
}

INLINE F16 bounds_of(const uint16_t* from) {
    F16 out;
    for (int i = 0; i < kParts; ++i)
        out.part[i] = (Reg)(widen(*(const PlainShorts*)(from + i * kRegLanes)) << 16);
    return out;
}

// The row of `first` .. `last` - 1 that has the largest lower bound.
static size_t screen_best(const ScreenRow& row, size_t first, size_t last) {
    F16 best = splat(-__builtin_inff()), place = splat(0.0f);
    size_t at = first;
    for (; at + kPanel <= last; at += kPanel) {
        const F16 lower = load(row.values + at) - bounds_of(row.bounds + at);
        place = where_less(best, lower, splat(static_cast<float>((at - first) / kPanel)), place);
        best = max(lower, best);
    }
    float lanes[kPanel], places[kPanel];
    store(lanes, best);
    store(places, place);
    size_t found = first;
    float largest = -__builtin_inff();
    const auto offer = [&](float lower, size_t index) {
        if (!(lower > largest)) return;
        largest = lower;
        found = index;
    };
    for (size_t lane = 0; lane < kPanel; ++lane)
        offer(lanes[lane], first + static_cast<size_t>(places[lane]) * kPanel + lane);
    for (; at < last; ++at) offer(row.values[at] - row.bound(at), at);
    return found;
}

// Which of sixteen tokens from `token` on may have noise of -log(scores) or more: noise is at most
// -log(1 - u), u uniform, of which the first 31 bits are read.
INLINE F16 noise_room(uint64_t start, size_t token) {
    uint64_t x[kPanel];
    for (size_t i = 0; i < kPanel; ++i)
        x[i] = start + (token + i + 1) * 0x9e3779b97f4a7c15ULL;
    for (size_t i = 0; i < kPanel; ++i) x[i] = (x[i] ^ x[i] >> 30) * 0xbf58476d1ce4e5b9ULL;
    for (size_t i = 0; i < kPanel; ++i) x[i] = (x[i] ^ x[i] >> 27) * 0x94d049bb133111ebULL;
    float rest[kPanel];
    for (size_t i = 0; i < kPanel; ++i)
        rest[i] = static_cast<float>(static_cast<int32_t>(~(x[i] ^ x[i] >> 31) >> 33));
    return load(rest) * splat(0x1p-31f);
}

// Whether a >= b in some lane.
INLINE bool any_reaches(F16 a, F16 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a.part[0], (__m512)b.part[0], _CMP_GE_OQ) != 0;
#else
    Int any = {};
    for (int i = 0; i < kParts; ++i) any |= (Int)(a.part[i] >= b.part[i]);
    int32_t all = 0;
    for (int lane = 0; lane < kRegLanes; ++lane) all |= any[lane];
    return all != 0;
#endif
}

// Writes the tokens of `first` .. `last` - 1 whose score may reach the threshold; returns how many.
static size_t screen_survivors(const ScreenRow& row, size_t first, size_t last, int32_t* out) {
    // What the logit must reach at least, whatever the noise, less what the product rounds.
    const float least = (row.threshold - (row.noise ? 38.0f : 0.0f)) * row.temperature;
    const F16 lowest = splat(least - __builtin_fabsf(least) * 1e-6f - 1e-30f);
    const F16 temperature = splat(row.temperature), threshold = splat(row.threshold);
    size_t count = 0;
    const auto keep = [&](F16 reached, F16 needed, size_t at, size_t lanes) INLINE_LAMBDA {
        if (!any_reaches(reached, needed)) return;
        float have[kPanel], need[kPanel];
        store(have, reached);
        store(need, needed);
        for (size_t lane = 0; lane < lanes; ++lane)
            if (have[lane] >= need[lane]) out[count++] = static_cast<int32_t>(at + lane);
    };
    const auto offer = [&](F16 upper, size_t at, size_t lanes) INLINE_LAMBDA {
        if (!any_reaches(upper, lowest)) return;
        const F16 score = upper / temperature;
        if (!row.noise) return keep(score, threshold, at, lanes);
        const F16 likely = exp(min(score - threshold, splat(0.0f))) * splat(1.001f);
        keep(likely, noise_room(row.start, at), at, lanes);
    };
    size_t at = first;
    for (; at + kPanel <= last; at += kPanel)
        offer(load(row.values + at) + bounds_of(row.bounds + at), at, kPanel);
    if (at == last) return count;
    float rest[kPanel] = {};
    for (size_t i = 0; at + i < last; ++i) rest[i] = row.values[at + i] + row.bound(at + i);
    offer(load(rest), at, last - at);
    return count;
}

}  // namespace

namespace PACELINE_ISA {

extern const ScreenKernels screen_kernels;
const ScreenKernels screen_kernels = {
    .width = screen_width,
    .panel_bytes = screen_panel_bytes,
    .pack = screen_pack,
    .multiply = screen_multiply,
    .best = screen_best,
    .survivors = screen_survivors,
};

}  // namespace PACELINE_ISA

}  // namespace paceline

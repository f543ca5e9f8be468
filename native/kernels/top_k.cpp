// The k most likely tokens of a row of logits, and their probabilities. CMake compiles this file once
// for each instruction set. All return the same bits: products that only some of them fuse are exact.

#include "kernels/top_k.hpp"

#include "kernels/kernels.hpp"
#include "kernels/simd.hpp"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace paceline {

namespace {

constexpr size_t kTopChunks = 64;         // of a row; every lane of a chunk is a group of tokens
constexpr float kExpScale = 12102203.0f;  // 2^23 / ln(2)
constexpr float kExpOne = 1065353216.0f;  // the bits of 1.0f, as a number
constexpr size_t kExactSize = 4096;       // rows up to this are summed exactly
constexpr float kMaxShift = 60.0f;         // exp of less neither overflows nor loses precision

// Bit i: whether lane i is above `limit`, or at least `limit`; a not-a-number is neither.
template <bool at_least>
INLINE uint32_t lanes_above(F16 v, float limit) {
#if defined(__AVX512F__)
    constexpr int kCompare = at_least ? _CMP_GE_OQ : _CMP_GT_OQ;
    return _mm512_cmp_ps_mask((__m512)v.part[0], _mm512_set1_ps(limit), kCompare);
#elif defined(__AVX2__)
    constexpr int kCompare = at_least ? _CMP_GE_OQ : _CMP_GT_OQ;
    uint32_t bits = 0;
    for (int part = 0; part < kParts; ++part) {
        const __m256 above = _mm256_cmp_ps((__m256)v.part[part], _mm256_set1_ps(limit), kCompare);
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(above)) << part * kRegLanes;
    }
    return bits;
#else
    float lane[kLanes];
    store(lane, v);
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i)
        bits |= static_cast<uint32_t>(at_least ? lane[i] >= limit : lane[i] > limit) << i;
    return bits;
#endif
}

// `mass` + exp(logit - shift) / 0.078, where `offset` is kExpOne - shift * kExpScale. Written as an
// integer, logit * kExpScale + offset has the exponent of the result and 11 bits of the logarithm
// of its mantissa, of which a cubic makes the mantissa within 2e-4, with a mean error of 0.
INLINE Reg add_rough_exp(Reg mass, Reg logit, Reg offset) {
    const Int scaled = __builtin_convertvector(logit * kExpScale + offset, Int), zero = Int{};
    const Int bits = scaled > zero ? scaled : zero;
    const Reg m = (Reg)((bits & 0x7ff000) | 0x3f800000), power = (Reg)(bits & 0x7f800000);
    const Reg near = m - 0.47021484375f;  // 12 bits: its square is exact
    const Reg mantissa = reg_fma(near, near, 6.6904597f - Reg{}) * (m + 0.83864856f);
    return reg_fma(mantissa, power, mass);
}

// exp(x) for x <= 88, as `exp` of math.hpp but without fused products.
INLINE F16 plain_exp(F16 x) {
    constexpr float kTerms[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f,
                                0.5f,          1.0f,          1.0f};
    const F16 clamped = max(x, splat(-86.0f)), magic = splat(12582912.0f);
    const F16 n = (clamped * splat(1.44269504f) + magic) - magic;
    F16 r = clamped - n * splat(0.693359375f);
    r = r + n * splat(2.12194440e-4f);
    F16 p = splat(1.0f / 5040.0f);
    for (const float term : kTerms) p = p * r + splat(term);
    for (int i = 0; i < kParts; ++i) {
        const Int exponent = __builtin_convertvector(n.part[i], Int) << 23;
        p.part[i] = (Reg)((Int)p.part[i] + exponent);
    }
    return p;
}

// What one reading of a row finds: the largest logit of every group, and the sum of all
// exp(logit - shift), roughly. Lane l of chunk c is the group of tokens (c * span + i) * 16 + l for
// i below `span`; tokens behind the last whole vector belong to none.
struct RowScan {
    const float* row;
    size_t size, vectors, span, chunks;
    float maxima[kTopChunks * kPanel];
    float shift, mass;

    RowScan(const float* logits, size_t count)
        : row(logits),
          size(count),
          vectors(count / kPanel),
          span(vectors ? (vectors + kTopChunks - 1) / kTopChunks : 1),
          chunks((vectors + span - 1) / span) {}

    size_t end(size_t chunk) const {
        return (chunk + 1) * span < vectors ? (chunk + 1) * span : vectors;
    }

    void read(float by) {
        shift = by;
        const Reg offset = (kExpOne - shift * kExpScale) - Reg{};
        F16 sums = splat(0.0f);
        for (size_t chunk = 0; chunk < chunks; ++chunk) {
            F16 high = splat(-__builtin_inff());
            for (size_t i = chunk * span; i < end(chunk); ++i) {
                const F16 logits = load(row + i * kPanel);
                high = max(logits, high);
                for (int part = 0; part < kParts; ++part)
                    sums.part[part] = add_rough_exp(sums.part[part], logits.part[part], offset);
            }
            store(maxima + chunk * kPanel, high);
        }
        if (vectors * kPanel < size) {
            const F16 logits = rest();
            for (int part = 0; part < kParts; ++part)
                sums.part[part] = add_rough_exp(sums.part[part], logits.part[part], offset);
        }
        mass = sum(sums);
    }

    // The tokens behind the last whole vector.
    F16 rest() const {
        float lanes[kPanel];
        for (size_t lane = 0; lane < kPanel; ++lane) {
            const size_t token = vectors * kPanel + lane;
            lanes[lane] = token < size ? row[token] : -__builtin_inff();
        }
        return load(lanes);
    }
};

// The largest so far, in order; of equal ones those that came first.
struct Largest {
    size_t k, filled;
    float* values;
    int32_t* tokens;  // or null

    void insert(float value, int32_t token) {
        if (filled == k && !(value > values[k - 1])) return;
        size_t place = filled < k ? filled++ : k - 1;
        for (; place > 0 && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            if (tokens) tokens[place] = tokens[place - 1];
        }
        values[place] = value;
        if (tokens) tokens[place] = token;
    }

    // Only logits of `limit` or more count; all values so far do.
    void insert(F16 logits, float limit, size_t first) {
        uint32_t bits = filled < k ? lanes_above<true>(logits, limit)
                                   : lanes_above<false>(logits, values[k - 1]);
        for (; bits; bits &= bits - 1) {
            float lanes[kPanel];
            store(lanes, logits);
            const int lane = __builtin_ctz(bits);
            insert(lanes[lane], static_cast<int32_t>(first) + lane);
        }
    }
};

// A logit that k groups reach, and so k tokens; -inf where there are fewer groups. `room`: k floats.
static float threshold(const RowScan& scan, size_t k, float* room) {
    if (scan.chunks * kPanel < k) return -__builtin_inff();
    Largest largest{k, 0, room, nullptr};
    for (size_t chunk = 0; chunk < scan.chunks; ++chunk)
        largest.insert(load(scan.maxima + chunk * kPanel), -__builtin_inff(), 0);
    return room[k - 1];
}

// Finds the best tokens among the chunks that reach the limit, in order of the tokens.
static size_t collect(const RowScan& scan, float limit, size_t k, int32_t* tokens, float* logits) {
    Largest best{k, 0, logits, tokens};
    for (size_t chunk = 0; chunk < scan.chunks; ++chunk) {
        if (!lanes_above<true>(load(scan.maxima + chunk * kPanel), limit)) continue;
        for (size_t i = chunk * scan.span; i < scan.end(chunk); ++i)
            best.insert(load(scan.row + i * kPanel), limit, i * kPanel);
    }
    for (size_t token = scan.vectors * kPanel; token < scan.size; ++token)
        if (scan.row[token] >= limit) best.insert(scan.row[token], static_cast<int32_t>(token));
    return best.filled;
}

// The exact sum of exp(logit - high) over a row.
static float exact_mass(const RowScan& scan, float high) {
    F16 mass = plain_exp(scan.rest() - splat(high));
    for (size_t i = 0; i < scan.vectors; ++i)
        mass = mass + plain_exp(load(scan.row + i * kPanel) - splat(high));
    return sum(mass);
}

// The rough sum without the terms of the best `k`, which `logits` [k] holds, exp(high) being 1.
static float rough_rest(const RowScan& scan, const float* logits, size_t k, float high) {
    constexpr float kUnit = 0.07802553f;  // of `add_rough_exp`
    const Reg offset = (kExpOne - scan.shift * kExpScale) - Reg{};
    float mass = scan.mass;
    for (size_t at = 0; at < k; at += kPanel) {
        float lanes[kPanel];
        for (size_t lane = 0; lane < kPanel; ++lane)
            lanes[lane] = at + lane < k ? logits[at + lane] : -__builtin_inff();
        F16 rough = splat(0.0f);
        for (int part = 0; part < kParts; ++part)
            rough.part[part] = add_rough_exp(rough.part[part], load(lanes).part[part], offset);
        mass -= sum(rough);
    }
    float out[kPanel];
    const F16 scale = plain_exp(splat(scan.shift - high)) * splat(kUnit);
    store(out, splat(mass > 0.0f ? mass : 0.0f) * scale);
    return out[0];
}

constexpr float kSmallestLog = -87.33654f;  // of the smallest normal number

// Of a long row the terms of the best, which make most of the sum, are exact, and the others rough.
// Where logits are not numbers, or infinite, all tokens are as likely.
static void top(const float* row, size_t size, size_t k, int32_t* tokens, float* probs) {
    RowScan scan(row, size);
    const float guess = scan.vectors ? largest(load(row)) : row[0];
    scan.read(guess - guess == 0.0f ? guess : 0.0f);
    const size_t filled = collect(scan, threshold(scan, k, probs), k, tokens, probs);
    const float high = probs[0];
    if (filled < k || !(high - high == 0.0f)) {
        for (size_t i = filled; i < k; ++i) tokens[i] = static_cast<int32_t>(i);
        for (size_t i = 0; i < k; ++i) probs[i] = 1.0f / static_cast<float>(size);
        return;
    }
    const bool small = size <= kExactSize;
    const float above = high - scan.shift;
    if (!small && (above > kMaxShift || above < -kMaxShift)) scan.read(high);
    float mass = small ? exact_mass(scan, high) : rough_rest(scan, probs, k, high);
    for (size_t at = 0; at < k; at += kPanel) {
        const size_t count = k - at < kPanel ? k - at : kPanel;
        float lanes[kPanel] = {};
        for (size_t lane = 0; lane < count; ++lane) lanes[lane] = probs[at + lane];
        store(lanes, plain_exp(load(lanes) - splat(high)));
        for (size_t lane = 0; lane < count; ++lane) {
            // `plain_exp` ends where numbers are no longer normal; what is banned has no share.
            if (probs[at + lane] - high < kSmallestLog) lanes[lane] = 0.0f;
            probs[at + lane] = lanes[lane];
            if (!small) mass += lanes[lane];
        }
    }
    for (size_t i = 0; i < k; ++i) probs[i] /= mass;
}

}  // namespace

extern const TopRow JOIN(top_, PACELINE_ISA);
const TopRow JOIN(top_, PACELINE_ISA) = top;

}  // namespace paceline

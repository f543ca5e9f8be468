// Products of int8 activations and weights in blocks of 32 inputs: codes of 2 to 8 bits, one or two
// scales for each block, and minima in some formats. All formats share one layout of activations.
//
// Each block of 32 inputs of a token becomes int8 numbers, -127 to 127, with a scale of its own.
// Weights are decoded once for all tokens of a pass to bytes: four neighbouring inputs of a row in
// one word ("quad"), the quads of sixteen rows side by side. Sums over 16 or 32 inputs are exact, in
// int32; they are scaled and added in fp32, in the order of the blocks, whatever the tiles are.
#pragma once

#include "kernels/formats/block_codes.hpp"

namespace paceline {

namespace {

// What the instructions multiply with signed bytes.
enum class ByteMath {
    any,     // unsigned bytes, exactly: codes with kCodeOffset added where they are signed
    small,   // unsigned bytes; sums of two products saturate, so codes are kept small
    signed_  // signed bytes
};
#if defined(PACELINE_VNNI)
constexpr ByteMath kByteMath = ByteMath::any;
#elif defined(__AVX2__)
constexpr ByteMath kByteMath = ByteMath::small;
#elif defined(PACELINE_NEON_DOT)
constexpr ByteMath kByteMath = ByteMath::signed_;
#else
constexpr ByteMath kByteMath = ByteMath::any;
#endif

#if defined(__AVX512F__)
constexpr int kByteTokens = 16;  // of the widest tile; every width up to it is compiled
#elif defined(__AVX2__) || defined(PACELINE_NEON)
constexpr int kByteTokens = 6;
#else
constexpr int kByteTokens = 2;
#endif

// Words of a token for a block: its scale; the sums of its numbers, of the first 16 and of the last
// 16 of them, each times -kCodeOffset; the same times the scale, as floats; the quads.
constexpr size_t kByteSums = 1, kByteMinima = 4, kByteQuads = 7;
constexpr size_t kByteWords = kByteQuads + kBlockInputs / 4;
constexpr size_t kByteBlock = kBlockInputs * kPanel;  // bytes of a decoded block

// Tiles of equal width but for the last; none has room for more tokens than it holds.
struct ByteTiling {
    size_t n, width, count;
    size_t first(size_t tile) const { return tile * width; }
    size_t tokens(size_t tile) const { return tile + 1 < count ? width : n - tile * width; }
};

INLINE ByteTiling byte_tiling(size_t n) {
    const size_t count = (n + kByteTokens - 1) / kByteTokens, width = (n + count - 1) / count;
    return {n, width, (n + width - 1) / width};
}

// Calls use(Width<T>) for a number of tokens that is known only at run time.
template <int T = 1, class Use>
INLINE void with_tokens(size_t tokens, Use&& use) {
    if constexpr (T < kByteTokens) {
        if (tokens != T) return with_tokens<T + 1>(tokens, static_cast<Use&&>(use));
    }
    use(Width<T>{});
}

// How activations are laid out: for each tile, whether a block has numbers of 8 more bits for one
// of its tokens at least, [blocks]; the numbers, [blocks][kByteWords][tokens]; as many of 8 more
// bits, of such blocks only.
//
// A block has more bits where a token's largest value there is much larger than elsewhere: models
// have inputs that are a hundred times as large as others, whose rounding would be most of a
// product's error. To other tokens of the tile such a block adds exactly nothing.
struct ByteActivations {
    static size_t tile_words(size_t blocks, size_t tokens) {
        return blocks * (1 + 2 * kByteWords * tokens);
    }
    static size_t arranged_bytes(size_t n, size_t inputs) {
        const ByteTiling tiles = byte_tiling(n);
        return (tiles.count * blocks_of(inputs) + 2 * n * blocks_of(inputs) * kByteWords) *
               sizeof(int32_t);
    }
    // Where a tile begins.
    static const int32_t* tile_at(const void* x, const ByteTiling& tiles, size_t tile,
                                  size_t blocks) {
        return static_cast<const int32_t*>(x) + tile * tile_words(blocks, tiles.width);
    }

    // Part `part` of `parts` takes its share of the tiles or, where there are few, of the blocks.
    static void arrange(const float* rows, size_t stride, size_t n, size_t inputs,
                        const int32_t* order, void* out, size_t part, size_t parts) {
        const ByteTiling tiles = byte_tiling(n);
        const size_t all = blocks_of(inputs);
        const bool whole = tiles.count >= parts;
        const size_t begin = whole ? 0 : all * part / parts;
        const size_t end = whole ? all : all * (part + 1) / parts;
        const size_t first_tile = whole ? tiles.count * part / parts : 0;
        const size_t last_tile = whole ? tiles.count * (part + 1) / parts : tiles.count;
        for (size_t tile = first_tile; tile < last_tile; ++tile) {
            const size_t first = tiles.first(tile), width = tiles.tokens(tile);
            int32_t* words = const_cast<int32_t*>(tile_at(out, tiles, tile, all));
            for (size_t block = begin; block < end; ++block) words[block] = 0;
            for (size_t t = 0; t < width; ++t)
                arrange_row(rows + (first + t) * stride, inputs, order, begin, end, words, t,
                            width);
        }
    }

    // The values of a block in the order of the places; behind the last input, zeros.
    static const float* values_of(const float* row, size_t inputs, const int32_t* order,
                                  size_t block, float* gathered) {
        const size_t first = block * kBlockInputs;
        const size_t count = inputs - first < kBlockInputs ? inputs - first : kBlockInputs;
        if (!order && count == kBlockInputs) return row + first;
        for (size_t k = 0; k < kBlockInputs; ++k) {
            const size_t from = order && k < count ? static_cast<size_t>(order[first + k])
                                                   : first + k;
            gathered[k] = k < count ? row[from] : 0.0f;
        }
        return gathered;
    }

    // The size above which a block has more bits.
    static float limit_of(const float* row, size_t inputs, const int32_t* order) {
        alignas(64) float gathered[kBlockInputs];
        const size_t all = blocks_of(inputs);
        float squares = 0.0f;
        for (size_t block = 0; block < all; ++block) {
            const float* values = values_of(row, inputs, order, block, gathered);
            const float size = largest_size({load(values), load(values + kPanel)});
            squares += size * size;
        }
        return __builtin_sqrtf(kMoreBits * squares / static_cast<float>(all));
    }

    static void arrange_row(const float* row, size_t inputs, const int32_t* order, size_t begin,
                            size_t end, int32_t* words, size_t t, size_t width) {
        alignas(64) float gathered[kBlockInputs];
        const size_t all = blocks_of(inputs), block_words = kByteWords * width;
        const float limit = limit_of(row, inputs, order);
        int32_t* numbers = words + all;
        for (size_t block = begin; block < end; ++block) {
            const float* values = values_of(row, inputs, order, block, gathered);
            int32_t* to = numbers + block * block_words;
            int32_t* rest = to + all * block_words;
            const bool more = largest_size({load(values), load(values + kPanel)}) > limit;
            if (more && !words[block]) {
                words[block] = 1;
                for (size_t i = 0; i < block_words; ++i) rest[i] = 0;
            }
            arrange_block(values, to + t, more ? rest + t : nullptr, width);
        }
    }

    // Writes one block: numbers of 8 bits; where `rest` is given, too, what they miss as 8 more.
    static void arrange_block(const float* values, int32_t* to, int32_t* rest, size_t width) {
        const F16 halves[2] = {load(values), load(values + kPanel)};
        const float size = largest_size(halves);
        const bool numbers = size > kSmallest && size < __builtin_inff();
        // Where a value is no number, all products of the token are none.
        const float scale = numbers ? size / kMaxByte : size <= kSmallest ? 0.0f : size - size;
        const float inverse = numbers ? kMaxByte / size : 0.0f;
        write_block(halves, scale, inverse, to, width);
        if (!rest) return;
        // At most half a step is missing.
        F16 missing[2];
        for (int half = 0; half < 2; ++half)
            missing[half] = halves[half] - rounded(halves[half], inverse) * splat(scale);
        write_block(missing, scale / (2.0f * kMaxByte), inverse * (2.0f * kMaxByte), rest, width);
    }

    static void write_block(const F16 (&halves)[2], float scale, float inverse, int32_t* to,
                            size_t width) {
        alignas(64) int8_t bytes[kBlockInputs];
        int32_t sums[2];
        for (int half = 0; half < 2; ++half)
            sums[half] = store_bytes(rounded(halves[half], inverse), bytes + half * kPanel);
        const int32_t leads[3] = {-kCodeOffset * (sums[0] + sums[1]), -kCodeOffset * sums[0],
                                  -kCodeOffset * sums[1]};
        std::memcpy(to, &scale, sizeof(scale));
        for (size_t i = 0; i < 3; ++i) {
            const float scaled = scale * static_cast<float>(leads[i]);
            to[(kByteSums + i) * width] = leads[i];
            std::memcpy(to + (kByteMinima + i) * width, &scaled, sizeof(scaled));
        }
        for (size_t quad = 0; quad < kBlockInputs / 4; ++quad)
            std::memcpy(to + (kByteQuads + quad) * width, bytes + 4 * quad, sizeof(int32_t));
    }

    // Numbers from -127 to 127; where a value is none, 0 or any of them.
    INLINE_MEMBER F16 rounded(F16 values, float inverse) {
        const F16 magic = splat(12582912.0f);  // adding it rounds to an integer
        const F16 scaled = max(min(values * splat(inverse), splat(kMaxByte)), splat(-kMaxByte));
        return (scaled + magic) - magic;
    }

    // The largest size of 32 values; not finite if one of them is not: as integers, the bits of
    // sizes are in their order, infinity and what is no number behind all others.
    INLINE_MEMBER float largest_size(const F16 (&halves)[2]) {
        Int most = {};
        for (const F16& half : halves)
            for (int i = 0; i < kParts; ++i) {
                const Int bits = (Int)half.part[i] & 0x7fffffff;
                most = bits > most ? bits : most;
            }
        const int32_t bits = fold(most, [](auto a, auto b) { return a > b ? a : b; });
        float size;
        std::memcpy(&size, &bits, sizeof(size));
        return size;
    }

    // Stores sixteen integers as bytes; their sum.
    INLINE_MEMBER int32_t store_bytes(F16 numbers, int8_t* to) {
        Int sum = {};
        for (int i = 0; i < kParts; ++i) {
            const Int integers = __builtin_convertvector(numbers.part[i], Int);
            sum += integers;
#if defined(__AVX512F__)
            _mm_store_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(-1, (__m512i)integers));
#else
            for (int lane = 0; lane < kRegLanes; ++lane)
                to[i * kRegLanes + lane] = static_cast<int8_t>(integers[lane]);
#endif
        }
        return fold(sum, [](auto a, auto b) { return a + b; });
    }

    // All lanes by an operation in any order.
    template <class Operation>
    INLINE_MEMBER int32_t fold(Int value, Operation operation) {
        using Four = int32_t __attribute__((vector_size(16), may_alias));
        alignas(64) int32_t lanes[kRegLanes];
        *(Int*)lanes = value;
        Four all = *(Four*)lanes;
        for (int lane = 4; lane < kRegLanes; lane += 4) all = operation(all, *(Four*)(lanes + lane));
        return operation(operation(all[0], all[1]), operation(all[2], all[3]));
    }

    // What `finish` asks for.
    static const float* scales(const void*) { return nullptr; }

    static constexpr float kMaxByte = 127.0f;
    // More bits where a block has more than so many times its share of the row's error.
    static constexpr float kMoreBits = 2.0f;
    static constexpr float kSmallest = 1e-30f;  // blocks of smaller values are zero
};

// The codes of a type as `kByteMath` wants them: kBits of each, kOffset to take off.
template <class Codes, bool kMinima, bool kNibbles>
struct ByteCodes;

template <int kStored, int kAdd, bool kTable, bool kMinima, bool kNibbles>
struct ByteCodes<BlockCodes<kStored, kAdd, kTable>, kMinima, kNibbles> {
    static constexpr bool kAsTheyAre = kByteMath == ByteMath::any || (kTable && !kNibbles);
    static constexpr bool kEight = kAsTheyAre || kStored == 8;
    static constexpr int kBits = kEight ? 8 : kStored < 4 ? 4 : kStored;
    static constexpr int kOffset = kMinima    ? 0
                                   : kEight   ? kCodeOffset
                                   : kNibbles ? 8
                                              : kCodeOffset - kAdd;
    // Quad `q` of a block.
    INLINE_MEMBER Int quad(const uint8_t* block, size_t q, int part, const uint8_t* table) {
        using Codes = BlockCodes<kStored, kAsTheyAre ? kAdd : 0, kTable && kAsTheyAre>;
        return Codes::quad(block, q / kHalfQuads, static_cast<int>(q % kHalfQuads), part, table);
    }
};

// Codes that have been decoded, a byte each.
template <int kWidth, int kAdded>
struct DecodedBytes {
    static constexpr int kBits = kWidth, kOffset = kAdded;
    INLINE_MEMBER Int quad(const uint8_t* block, size_t q, int part, const uint8_t*) {
        return (Int)load_part((const float*)(block + q * kWordBytes), part);
    }
};

// Some panels times one tile: a few blocks of it.
struct ByteTile {
    const uint8_t* codes;        // of the first block of the first panel
    size_t panel_bytes, stride;  // bytes between panels, and between blocks
    const uint8_t* table;        // sixteen bytes that 4-bit codes name; or null
    const BlockScales* factors;  // [panels]
    size_t first_scale;          // of the first block
    size_t panels, blocks;
    const uint8_t* ahead;      // what to fetch of the first panel
    size_t ahead_bytes, step;  // between panels, and between quads
    const int32_t* x = nullptr;  // [blocks][kByteWords][tokens]
    Sums sums = {};
};

// sum + products of four neighbouring bytes, in each word.
INLINE Int add_quads(Int sum, Int codes, Int numbers) {
#if defined(PACELINE_VNNI)
    return dot_quads(sum, codes, numbers);
#elif defined(__AVX512BW__)  // codes less kCodeOffset: their sizes times numbers with their signs
    const __m512i signed_ = _mm512_xor_si512((__m512i)codes, _mm512_set1_epi8(-128));
    const __m512i turned = _mm512_mask_sub_epi8((__m512i)numbers, _mm512_movepi8_mask(signed_),
                                                _mm512_setzero_si512(), (__m512i)numbers);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_maskz_abs_epi8(-1, signed_), turned);
    return sum + (Int)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i signed_ = _mm256_xor_si256((__m256i)codes, _mm256_set1_epi8(-128));
    const __m256i turned = _mm256_sign_epi8((__m256i)numbers, signed_);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_), turned);
    return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(PACELINE_NEON_DOT)
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)codes, (int8x16_t)numbers);
#else
    const Shorts pairs = (Shorts)numbers;
    sum = add_pairs(sum, even_pair(codes), pairs << 8 >> 8);
    return add_pairs(sum, odd_pair(codes), pairs >> 8);
#endif
}

#if defined(__AVX2__) && !defined(PACELINE_VNNI)
// Sums of two products each, of small codes: they do not saturate.
INLINE Shorts small_pairs(Int codes, Int numbers) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_maddubs_epi16((__m512i)codes, (__m512i)numbers);
#else
    return (Shorts)_mm256_maddubs_epi16((__m256i)codes, (__m256i)numbers);
#endif
}
#else
INLINE Shorts small_pairs(Int, Int) { return Shorts{}; }
#endif

#if defined(PACELINE_NEON_MATRIX)
// sum + the products of two rows of eight bytes with those of two tokens: both tokens' of the first
// row, then of the second.
INLINE Int add_matrix(Int sum, Int rows, Int tokens) {
    return (Int)vmmlaq_s32((int32x4_t)sum, (int8x16_t)rows, (int8x16_t)tokens);
}
// The words of two registers in turn: those of their first halves, or of their second ones.
INLINE Int zip_low(Int a, Int b) { return (Int)vzip1q_s32((int32x4_t)a, (int32x4_t)b); }
INLINE Int zip_high(Int a, Int b) { return (Int)vzip2q_s32((int32x4_t)a, (int32x4_t)b); }
// Every other word of two registers, from the first or the second on.
INLINE Int unzip_even(Int a, Int b) { return (Int)vuzp1q_s32((int32x4_t)a, (int32x4_t)b); }
INLINE Int unzip_odd(Int a, Int b) { return (Int)vuzp2q_s32((int32x4_t)a, (int32x4_t)b); }
// Two words side by side, in the first half.
INLINE Int two_words(const int32_t* from) {
    return (Int)vcombine_s32(vld1_s32(from), vdup_n_s32(0));
}
#endif

// `Codes` gives quads; see ByteCodes. A block has kScales scales, and as many minima or none.
template <class Codes, int kScales, bool kMinima>
struct ByteProducts {
    static constexpr int kBits = Codes::kBits, kOffset = Codes::kOffset;
    static constexpr bool kSmall = kByteMath == ByteMath::small && kBits < 8;
    // Quads whose sums of pairs fit 16 bits: 4 bits 2 x 15 x 127 x 8 = 30480, 5 bits 31496, 6 bits
    // 32004.
    static constexpr size_t kFits = kBits == 4 ? 8 : kBits == 5 ? 4 : 2;
    static constexpr size_t kTogether = kScales == 2 && kFits > kHalfQuads ? kHalfQuads : kFits;

    static constexpr int panels(int tokens) {
        if (kParts == 1) return tokens <= 4 ? 4 : 1;
        return tokens * 2 * kParts * (kSmall && kTogether < 8 ? 2 : 1) <= 12 ? 2 : 1;
    }
    // Whether sums of all blocks wait in registers, or in memory.
    static constexpr bool held(int panels, int tokens) {
        return kParts == 1 && panels * (2 * tokens + 1) < kRegisters;
    }

    // A tile of T tokens times all panels.
    template <int T>
    static void multiply(const ByteTile& job) {
        constexpr size_t P = panels(T);
        for (size_t first = 0; first < job.panels; first += P) tile<P, T>(job, first);
    }

    // Where fewer than P panels are left, the last ones are computed twice.
    template <int P, int T>
    static void tile(const ByteTile& job, size_t first) {
        constexpr bool kHeld = held(P, T);
        const uint8_t* codes[P];
        const uint8_t* ahead[P];
        const BlockScales* factors[P];
        float* sums[P];
        alignas(64) float spare[P > 1 ? T * kPanel : 1];
#pragma GCC unroll 4
        for (size_t p = 0; p < P; ++p) {
            const bool real = first + p < job.panels;
            const size_t panel = real ? first + p : first;
            codes[p] = job.codes + panel * job.panel_bytes;
            ahead[p] = job.ahead + panel * job.ahead_bytes;
            factors[p] = job.factors + panel;
            sums[p] = real ? job.sums.at + panel * job.sums.stride : spare;
        }
        const int32_t* x = job.x;
        Reg total[P][T][kParts];
        each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
            total[p][t][i] = job.sums.resume ? load_part(sums[p] + t * kPanel, i) : Reg{};
            if (!kHeld) store_part(sums[p] + t * kPanel, i, total[p][t][i]);
        });
        for (size_t block = 0, scale = job.first_scale; block < job.blocks; ++block) {
            Int sum[P][T][kParts];
            constexpr size_t kQuads = kBlockInputs / 4 / kScales;
#pragma GCC unroll 1
            for (size_t part = 0; part < kScales; ++part, scale += kPanel) {
                const size_t sums_at = kScales == 1 ? 0 : 1 + part;
                begin_block<P, T>(sum, x + (kByteSums + sums_at) * T);
                const int32_t* quads = x + (kByteQuads + part * kQuads) * T;
#if defined(PACELINE_NEON_MATRIX)
                if constexpr (T > 1)
                    add_matrices<P, T, kQuads>(sum, codes, ahead, job, part * kQuads, quads);
                else
#endif
                    add_block<P, T, kQuads>(sum, codes, ahead, job, part * kQuads, quads);
                const float* minima = (const float*)x + (kByteMinima + sums_at) * T;
                each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                    float* at = sums[p] + t * kPanel;
                    Reg value = kHeld ? total[p][t][i] : load_part(at, i);
                    const Reg scaled = __builtin_convertvector(sum[p][t][i], Reg) *
                                       (((const float*)x)[t] - Reg{});
                    value = reg_fma(scaled, load_part(factors[p]->scales + scale, i), value);
                    if constexpr (kMinima)
                        value = reg_fma(minima[t] - Reg{},
                                        load_part(factors[p]->minima + scale, i), value);
                    if (kHeld)
                        total[p][t][i] = value;
                    else
                        store_part(at, i, value);
                });
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                codes[p] += job.stride;
                ahead[p] += kBlockInputs / 4 * job.step;
            }
            x += kByteWords * T;
        }
        if (kHeld)
            each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                store_part(sums[p] + t * kPanel, i, total[p][t][i]);
            });
    }

    // What the sums of a block start from: the offset of its codes times the sum of its numbers.
    template <int P, int T>
    INLINE_MEMBER void begin_block(Int (&sum)[P][T][kParts], const int32_t* sums) {
        // Instructions for signed bytes, or by sizes and signs, take kCodeOffset off codes of 8 bits.
        constexpr bool kTakenOff = kBits == 8 && kByteMath != ByteMath::any;
        constexpr int kLeft = kOffset - (kTakenOff ? kCodeOffset : 0);
        each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
            if constexpr (kLeft == 0)
                sum[p][t][i] = Int{};
            else if constexpr (kLeft < 0)
                sum[p][t][i] = Int{} - splat_word(sums[t]);
            else
                sum[p][t][i] = splat_word(sums[t]) >> (7 - __builtin_ctz(kLeft));
        });
    }

    // Adds the products of N quads from `quad` on.
    template <int P, int T, size_t N>
    INLINE_MEMBER void add_block(Int (&sum)[P][T][kParts], const uint8_t* const (&codes)[P],
                                 const uint8_t* const (&ahead)[P], const ByteTile& job,
                                 size_t quad, const int32_t* x) {
        [[maybe_unused]] Shorts pairs[P][T][kParts];
#pragma GCC unroll 8
        for (size_t q = 0; q < N; ++q) {
            Int w[P][kParts];
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p)
                __builtin_prefetch(ahead[p] + (quad + q) * job.step, 0, fetches_near<T> ? 3 : 2);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i)
                    w[p][i] = as_multiplied(Codes::quad(codes[p], quad + q, i, job.table));
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const Int numbers = splat_word(x[q * T + t]);
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p)
#pragma GCC unroll 4
                    for (int i = 0; i < kParts; ++i)
                        if constexpr (kSmall) {
                            const Shorts more = small_pairs(w[p][i], numbers);
                            pairs[p][t][i] = q % kTogether ? pairs[p][t][i] + more : more;
                        } else {
                            sum[p][t][i] = add_quads(sum[p][t][i], w[p][i], numbers);
                        }
            }
            if constexpr (kSmall)
                if ((q + 1) % kTogether == 0)
                    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
                        sum[p][t][i] = add_pairs(sum[p][t][i], pairs[p][t][i], Shorts{} + 1);
                    });
        }
    }

#if defined(PACELINE_NEON_MATRIX)
    // The same with eight bytes of two rows times those of two tokens at once: meanwhile the sums of
    // tokens t and t + 1 hold rows 0 and 1 of both, and rows 2 and 3 of both.
    template <int P, int T, size_t N>
    INLINE_MEMBER void add_matrices(Int (&sum)[P][T][kParts], const uint8_t* const (&codes)[P],
                                    const uint8_t* const (&ahead)[P], const ByteTile& job,
                                    size_t quad, const int32_t* x) {
        each_pair<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
            const Int a = sum[p][t][i], b = sum[p][t + 1][i];
            sum[p][t][i] = zip_low(a, b);
            sum[p][t + 1][i] = zip_high(a, b);
        });
#pragma GCC unroll 4
        for (size_t q = 0; q < N; q += 2, x += 2 * T) {
            Int tokens[T / 2];
#pragma GCC unroll 8
            for (int t = 0; t + 1 < T; t += 2)
                tokens[t / 2] = zip_low(two_words(x + t), two_words(x + T + t));
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                __builtin_prefetch(ahead[p] + (quad + q) * job.step, 0, 3);
                __builtin_prefetch(ahead[p] + (quad + q + 1) * job.step, 0, 3);
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i) {
                    const Int a = as_multiplied(Codes::quad(codes[p], quad + q, i, job.table));
                    const Int b = as_multiplied(Codes::quad(codes[p], quad + q + 1, i, job.table));
                    const Int low = zip_low(a, b), high = zip_high(a, b);
#pragma GCC unroll 8
                    for (int t = 0; t + 1 < T; t += 2) {
                        sum[p][t][i] = add_matrix(sum[p][t][i], low, tokens[t / 2]);
                        sum[p][t + 1][i] = add_matrix(sum[p][t + 1][i], high, tokens[t / 2]);
                    }
                    if constexpr (T % 2 == 1) {
                        Int& last = sum[p][T - 1][i];
                        last = add_quads(last, a, splat_word(x[T - 1]));
                        last = add_quads(last, b, splat_word(x[2 * T - 1]));
                    }
                }
            }
        }
        each_pair<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
            const Int a = sum[p][t][i], b = sum[p][t + 1][i];
            sum[p][t][i] = unzip_even(a, b);
            sum[p][t + 1][i] = unzip_odd(a, b);
        });
    }

    // use(panel, token, part) for each register of the first token of each pair of tokens; unrolled.
    template <int P, int T, class Use>
    INLINE_MEMBER void each_pair(Use&& use) {
        each<P, T / 2>([&](int p, int t, int i) INLINE_LAMBDA { use(p, 2 * t, i); });
    }
#endif

    INLINE_MEMBER Int as_multiplied(Int codes) {
        if constexpr (kByteMath == ByteMath::signed_ && kBits == 8)
            return codes ^ static_cast<int32_t>(0x80808080);
        return codes;
    }
};

// Blocks from `block` on, of `all`, times all tiles; then those of them that have more bits.
template <class From, int kScales, bool kMinima>
INLINE void multiply_byte_tiles(const Product& job, ByteTile work, size_t block, size_t all,
                                const ByteTiling& tiles, Sums sums) {
    for (size_t tile = 0; tile < tiles.count; ++tile) {
        const size_t token = tiles.first(tile), width = tiles.tokens(tile);
        const int32_t* more = ByteActivations::tile_at(job.x, tiles, tile, all);
        const int32_t* numbers = more + all + kByteWords * block * width;
        work.x = numbers;
        work.sums = {sums.at + token * kPanel, sums.stride, block > 0};
        with_tokens(width, [&](auto t) {
            constexpr int T = decltype(t)::value;
            using Bytes8 = ByteProducts<From, kScales, kMinima>;
            Bytes8::template multiply<T>(work);
            for (size_t i = 0; i < work.blocks; ++i) {
                if (!more[block + i]) continue;
                ByteTile again = work;
                again.codes += i * work.stride;
                again.first_scale = i * kScales * kPanel;
                again.blocks = 1;
                again.x = numbers + kByteWords * (all + i) * width;
                again.sums.resume = true;
                again.step = 0;  // it has been fetched
                Bytes8::template multiply<T>(again);
            }
        });
    }
}

// Decodes the codes of a tile, which has them at `to` then.
template <class Bytes>
INLINE void decode_tile(ByteTile& tile, uint8_t* to) {
    uint8_t* out = to;
    for (size_t p = 0; p < tile.panels; ++p)
        for (size_t block = 0; block < tile.blocks; ++block)
#pragma GCC unroll 8
            for (int q = 0; q < static_cast<int>(kBlockInputs / 4); ++q, out += kWordBytes)
#pragma GCC unroll 4
                for (int part = 0; part < kParts; ++part)
                    store_part((float*)out, part,
                               (Reg)Bytes::quad(
                                   tile.codes + p * tile.panel_bytes + block * tile.stride,
                                   static_cast<size_t>(q), part, tile.table));
    tile.codes = to;
    tile.panel_bytes = tile.blocks * kByteBlock;
    tile.stride = kByteBlock;
}

// How far ahead panels are fetched, in bytes.
INLINE size_t byte_fetch(const ByteTiling& tiles, size_t panels, size_t panel_bytes) {
    return tiles.count == 1 && panels > 1 && panel_bytes < size_t{1} << 15 ? panels * panel_bytes
                                                                           : 4096;
}

}  // namespace

}  // namespace paceline

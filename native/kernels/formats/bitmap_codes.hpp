// Integers of 8 bits of which those that are not zero are kept, with a bitmap.
//
// A panel has for each block where its kept numbers begin; then the bitmaps, 64 bytes each, a bit for
// each byte of the decoded block: quad by quad, row by row, input by input; then the kept numbers,
// signed, in the order of the bits. Behind them may be read what is never used.
#pragma once

#include "kernels/formats/grouped.hpp"

namespace paceline {

namespace {

constexpr size_t kBitmapBytes = kByteBlock / 8;
constexpr size_t kReadBehind = 64;  // bytes behind the kept numbers that may be read

// Eight bytes for each byte of a bitmap: which kept number comes at each bit, or none (bit 7).
struct Expansions {
    alignas(64) uint8_t of[256][8];
};
constexpr Expansions make_expansions() {
    Expansions expansions{};
    for (int bits = 0; bits < 256; ++bits)
        for (int bit = 0, kept = 0; bit < 8; ++bit)
            expansions.of[bits][bit] = static_cast<uint8_t>(bits >> bit & 1 ? kept++ : 0x80);
    return expansions;
}
[[maybe_unused]] constexpr Expansions kExpansions = make_expansions();

// Eight bytes: those of `from`, in order, where a bit is set, and `zero` elsewhere.
INLINE void expand_eight(const uint8_t* from, uint8_t bits, uint8_t zero, uint8_t* to) {
#if defined(__AVX2__)
    const __m128i kept = _mm_loadl_epi64((const __m128i*)from);
    const __m128i places = _mm_loadl_epi64((const __m128i*)kExpansions.of[bits]);
    const __m128i flip = _mm_set1_epi8(static_cast<char>(zero));
    _mm_storel_epi64((__m128i*)to, _mm_xor_si128(_mm_shuffle_epi8(kept, places), flip));
#elif defined(PACELINE_NEON)
    const uint8x8_t kept = vtbl1_u8(vld1_u8(from), vld1_u8(kExpansions.of[bits]));
    vst1_u8(to, veor_u8(kept, vdup_n_u8(zero)));
#else
    for (int bit = 0; bit < 8; ++bit)
        to[bit] = static_cast<uint8_t>((bits >> bit & 1 ? *from++ : 0) ^ zero);
#endif
}

#if defined(__AVX512BW__)
// The same for a whole block by the instruction that does just this, which not all machines have.
__attribute__((target("avx512vbmi2"))) static void expand_block(const uint8_t* bitmap,
                                                                const uint8_t* from, uint8_t* to) {
    const __m512i zero = _mm512_set1_epi8(-128);
    for (size_t at = 0; at < kBitmapBytes; at += 8, to += 64) {
        uint64_t bits;
        std::memcpy(&bits, bitmap + at, sizeof(bits));
        const __m512i kept = _mm512_loadu_si512(from);
        const __m512i wide = _mm512_maskz_expand_epi8(bits, kept);
        _mm512_storeu_si512(to, _mm512_xor_si512(wide, zero));
        from += __builtin_popcountll(bits);
    }
}
#endif

struct BitmapCodes {
    static constexpr bool kEight = false;
    static constexpr int kBits = 8, kHalf = 128;
    static constexpr size_t kBlockBytes = 0;  // they lie at no fixed distance

    struct Parts {
        const uint8_t *bitmaps, *kept;
    };
    static Parts parts(const uint8_t* codes, size_t blocks) {
        const uint8_t* bitmaps = codes + blocks * sizeof(uint32_t);
        return {bitmaps, bitmaps + blocks * kBitmapBytes};
    }
    static uint32_t start(const uint8_t* codes, size_t block) {
        uint32_t start;
        std::memcpy(&start, codes + block * sizeof(start), sizeof(start));
        return start;
    }

    // Decodes blocks to bytes, kByteBlock of each, and fetches what lies `fetch` bytes ahead.
    static void decode(const uint8_t* codes, size_t blocks, size_t first, size_t count,
                       size_t fetch, uint8_t* to) {
        const Parts of = parts(codes, blocks);
        for (size_t block = first; block < first + count; ++block, to += kByteBlock) {
            const uint8_t* kept = of.kept + start(codes, block);
            const uint8_t* bitmap = of.bitmaps + block * kBitmapBytes;
            __builtin_prefetch(bitmap + fetch, 0, 3);
            for (size_t at = 0; at < kByteBlock / 2; at += 64)
                __builtin_prefetch(kept + fetch + at, 0, 3);
            expand(bitmap, kept, to);
        }
    }

    INLINE_MEMBER void expand(const uint8_t* bitmap, const uint8_t* kept, uint8_t* to) {
#if defined(__AVX512BW__)
        static const bool fast = __builtin_cpu_supports("avx512vbmi2");
        if (fast) return expand_block(bitmap, kept, to);
#endif
        for (size_t at = 0; at < kBitmapBytes; ++at, to += 8) {
            expand_eight(kept, bitmap[at], kHalf, to);
            kept += __builtin_popcount(bitmap[at]);
        }
    }

    // Writes a panel from its codes in the order of bytes; what has no room is left out.
    static void encode(const uint8_t* bytes, size_t blocks, size_t room, uint8_t* codes) {
        const Parts of = parts(codes, blocks);
        auto* kept = const_cast<uint8_t*>(of.kept);
        size_t used = 0;
        for (size_t block = 0; block < blocks; ++block, bytes += kByteBlock) {
            auto* bitmap = const_cast<uint8_t*>(of.bitmaps) + block * kBitmapBytes;
            const auto start = static_cast<uint32_t>(used);
            std::memcpy(codes + block * sizeof(start), &start, sizeof(start));
            for (size_t i = 0; i < kByteBlock; ++i) {
                const bool keeps = bytes[i] != kHalf && used < room;
                bitmap[i / 8] = static_cast<uint8_t>((bitmap[i / 8] & ~(1 << i % 8)) |
                                                     (keeps ? 1 << i % 8 : 0));
                if (keeps) kept[used++] = static_cast<uint8_t>(bytes[i] ^ kHalf);
            }
        }
    }
};

template <bool kNibbles>
struct ByteCodes<BitmapCodes, true, kNibbles> {
    static constexpr int kBits = 8, kOffset = 0;
};

}  // namespace

}  // namespace paceline

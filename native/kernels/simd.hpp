// Sixteen floats as this build's machine holds them, and the few functions kernels need.
//
// Included only by kernels.cpp and blocks.cpp, which are compiled once for each instruction set. Everything has
// internal linkage: a function shared by two builds could be linked in the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// Without intrinsics where PACELINE_PLAIN is defined: what the other builds are compared with.
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && !defined(PACELINE_PLAIN)
#include <arm_neon.h>
#define PACELINE_NEON
#if defined(__ARM_FEATURE_DOTPROD)
#define PACELINE_NEON_DOT
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define PACELINE_NEON_MATRIX
#endif
#endif

// Whether one instruction multiplies neighbouring shorts or bytes, and adds the products to a word.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define PACELINE_VNNI
#endif

#define INLINE static inline __attribute__((always_inline))

#define INLINE_MEMBER static inline __attribute__((always_inline))

#define INLINE_LAMBDA __attribute__((always_inline))

namespace paceline {

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kParts = 64 / kBytes;
#if defined(__AVX512F__) || defined(PACELINE_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

using Reg = float __attribute__((vector_size(kBytes)));
using Int = int32_t __attribute__((vector_size(kBytes)));
constexpr int kRegLanes = kBytes / 4;

INLINE Reg reg_fma(Reg a, Reg b, Reg c) {
#if defined(__AVX512F__)
    return (Reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(PACELINE_NEON)
    return (Reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FP_FAST_FMAF)  // every machine of this architecture fuses them
    for (int lane = 0; lane < kRegLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#else
    return a * b + c;  // rounds twice, but everywhere in the same way
#endif
}

#if defined(PACELINE_VNNI)
// sum + the products of two neighbouring shorts, in each word.
INLINE Int dot_pairs(Int sum, Int a, Int b) {
#if defined(__AVX512VNNI__)
    return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
    return (Int)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#endif
}

// sum + the products of four neighbouring bytes, unsigned by signed.
INLINE Int dot_quads(Int sum, Int unsigned_, Int signed_) {
#if defined(__AVX512VNNI__)
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_, (__m512i)signed_);
#else
    return (Int)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)unsigned_, (__m256i)signed_);
#endif
}
#endif

struct F16 {
    Reg part[kParts];
};

#define EACH_PART(expression)                                  \
    F16 out;                                                   \
    for (int i = 0; i < kParts; ++i) out.part[i] = expression; \
    return out

// Whole registers, not structures, are what the compiler keeps out of memory.
using Loose = float __attribute__((vector_size(kBytes), aligned(4), may_alias));
INLINE Reg load_part(const float* from, int part) {
    return *(const Loose*)(from + part * kRegLanes);
}
INLINE void store_part(float* to, int part, Reg value) {
    *(Loose*)(to + part * kRegLanes) = value;
}
INLINE F16 load(const float* from) { EACH_PART(load_part(from, i)); }
INLINE void store(float* to, F16 v) {
    for (int i = 0; i < kParts; ++i) store_part(to, i, v.part[i]);
}
INLINE F16 splat(float value) { EACH_PART(value - Reg{}); }
INLINE F16 operator+(F16 a, F16 b) { EACH_PART(a.part[i] + b.part[i]); }
INLINE F16 operator-(F16 a, F16 b) { EACH_PART(a.part[i] - b.part[i]); }
INLINE F16 operator*(F16 a, F16 b) { EACH_PART(a.part[i] * b.part[i]); }
INLINE F16 operator/(F16 a, F16 b) { EACH_PART(a.part[i] / b.part[i]); }
INLINE F16 fma(F16 a, F16 b, F16 c) { EACH_PART(reg_fma(a.part[i], b.part[i], c.part[i])); }
INLINE F16 max(F16 a, F16 b) { EACH_PART(a.part[i] > b.part[i] ? a.part[i] : b.part[i]); }
INLINE F16 min(F16 a, F16 b) { EACH_PART(a.part[i] < b.part[i] ? a.part[i] : b.part[i]); }
// a < b ? yes : no, lane by lane.
INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
    EACH_PART(a.part[i] < b.part[i] ? yes.part[i] : no.part[i]);
}

// Lanes are folded in halves: the same order in every build.
INLINE float sum(F16 v) {
    float lane[kLanes];
    store(lane, v);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}
INLINE float largest(F16 v) {
    float lane[kLanes];
    store(lane, v);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

// Half a register's bytes to shorts, or shorts to ints. Compilers make several instructions of a
// plain conversion.
using Shorts = int16_t __attribute__((vector_size(kBytes), may_alias));
using SignedBytes = int8_t __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));
using PlainBytes = uint8_t __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));
using PlainShorts = uint16_t __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));
#if defined(__AVX512F__)
#define WIDEN(name, type, half) (type) _mm512_maskz_##name(-1, (__m256i)half)
#elif defined(__AVX2__)
#define WIDEN(name, type, half) (type) _mm256_##name((__m128i)half)
#else
#define WIDEN(name, type, half) __builtin_convertvector(half, type)
#endif
using LooseShorts = int16_t __attribute__((vector_size(kBytes), aligned(1), may_alias));
INLINE Shorts widen(SignedBytes half) { return WIDEN(cvtepi8_epi16, Shorts, half); }
INLINE Shorts widen(PlainBytes half) { return WIDEN(cvtepu8_epi16, Shorts, half); }
INLINE Int widen(PlainShorts half) { return WIDEN(cvtepu16_epi32, Int, half); }
#undef WIDEN

// Part `part` of sixteen bytes, as ints.
INLINE Int widen_bytes(const uint8_t* from, int part) {
    from += part * kRegLanes;
#if defined(__AVX512F__)
    return (Int)_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
    return (Int)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    Int out = {};
    for (int lane = 0; lane < kRegLanes; ++lane) out[lane] = from[lane];
    return out;
#endif
}

// 0, 1, ... 15: to mask the end of a row.
INLINE F16 lane_index() {
    static const float index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(index);
}

}  // namespace

}  // namespace paceline

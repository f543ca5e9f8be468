// Types of scales.
#pragma once

#include "kernels/formats/floats.hpp"

namespace paceline {

namespace {

// Scales in bf16.
struct Bf16Scales : Bf16 {
    static constexpr size_t kHeader = 0;
    static float row_factor(const float*, size_t) { return 1.0f; }
};

// Scales in fp16 times a power of two for each row: those of any file in fp16, and those in bf16
// that lie within some thirty powers of two.
struct Fp16Scales : Fp16 {
    static constexpr size_t kHeader = kPanel * sizeof(float);
    static float row_factor(const float* scales, size_t count) {
        float largest = 0.0f;
        bool exact = true;
        for (size_t i = 0; i < count; ++i) {
            largest = max_of(largest, __builtin_fabsf(scales[i]));
            exact = exact && from(to(scales[i])) == scales[i];
        }
        return row_factor(largest, exact);
    }
    // `exact`: all are fp16 numbers as they are.
    static float row_factor(float largest, bool exact) {
        if (exact || !(largest >= 0x1p-110f)) return 1.0f;
        uint32_t bits;
        std::memcpy(&bits, &largest, sizeof(bits));
        bits = (bits & 0x7f800000) - (15u << 23);  // so that the largest is 2^15 to 2^16
        std::memcpy(&largest, &bits, sizeof(bits));
        return largest;
    }
    static float max_of(float a, float b) { return a > b ? a : b; }
};

}  // namespace

}  // namespace paceline

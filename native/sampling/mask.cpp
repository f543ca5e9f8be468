#include "sampling/mask.hpp"

#include <algorithm>
#include <array>
#include <limits>

namespace paceline {

namespace {

constexpr float kForbidden = -std::numeric_limits<float>::infinity();

constexpr auto kBits = [] {
    std::array<uint32_t, 32> bits{};
    for (size_t i = 0; i < 32; ++i) bits[i] = 1u << i;
    return bits;
}();

// One constant for each bit, so that vector units need no shifts.
void select(const float* in, uint32_t allowed, float* out) {
    for (size_t i = 0; i < 32; ++i) {
        const float value = in[i];
        out[i] = allowed & kBits[i] ? value : kForbidden;
    }
}

}  // namespace

void mask_logits(const float* in, const uint32_t* bits, size_t size, float* out) {
    for (size_t start = 0; start < size; start += 32) {
        const uint32_t allowed = bits[start / 32];
        const size_t count = std::min<size_t>(32, size - start);
        if (!allowed)
            std::fill_n(out + start, count, kForbidden);
        else if (!~allowed)
            std::copy_n(in + start, count, out + start);
        else if (count == 32)
            select(in + start, allowed, out + start);
        else
            for (size_t i = 0; i < count; ++i)
                out[start + i] = allowed >> i & 1 ? in[start + i] : kForbidden;
    }
}

}  // namespace paceline

// Work on single rows: norms, sums, the likeliest tokens.
#pragma once

#include "kernels/math.hpp"

namespace paceline {

namespace {

// Rows are padded with zeros, so a square of the padding adds nothing; a centred one is masked.
static void norm(const NormJob& job, const float* x, float* out) {
    const size_t size = job.size, room = padded(size);
    float mean = 0.0f;
    if (job.centred) {
        F16 total = splat(0.0f);
        for (size_t i = 0; i < room; i += kPanel) total = total + load(x + i);
        mean = sum(total) / static_cast<float>(size);
    }
    F16 squares = splat(0.0f);
    for (size_t i = 0; i < room; i += kPanel) {
        const F16 left = splat(static_cast<float>(size) - static_cast<float>(i));
        const F16 centred = where_less(lane_index(), left, load(x + i) - splat(mean), splat(0.0f));
        squares = fma(centred, centred, squares);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + job.eps);
    for (size_t i = 0; i < room; i += kPanel) {
        F16 value = (load(x + i) - splat(mean)) * splat(scale) * load(job.weight + i);
        if (job.bias) value = value + load(job.bias + i);
        store(out + i, value);
    }
}

static void add(float* x, const float* y, size_t size) {
    for (size_t i = 0; i < size; i += kPanel) store(x + i, load(x + i) + load(y + i));
}

static float read(const float* from, size_t bytes) {
    F16 total[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    for (size_t i = 0; i + 4 * kPanel <= bytes / sizeof(float); i += 4 * kPanel)
        for (size_t j = 0; j < 4; ++j) total[j] = total[j] + load(from + i + j * kPanel);
    return sum(total[0] + total[1] + total[2] + total[3]);
}

}  // namespace

}  // namespace paceline

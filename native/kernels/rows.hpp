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

// Puts a logit among the k best so far; `filled` of them are set.
INLINE void insert(float logit, int32_t token, size_t k, size_t& filled, float* best,
                   int32_t* tokens) {
    if (filled == k && !(logit > best[k - 1])) return;
    size_t place = filled < k ? filled++ : k - 1;
    for (; place > 0 && logit > best[place - 1]; --place) {
        best[place] = best[place - 1];
        tokens[place] = tokens[place - 1];
    }
    best[place] = logit;
    tokens[place] = token;
}

// Tokens are met in order, so of equal logits the lower token stays first.
static void top(const float* row, size_t size, size_t k, int32_t* tokens, float* probs) {
    size_t filled = 0, i = 0;
    for (; i + kPanel <= size; i += kPanel) {
        if (filled == k && !(largest(load(row + i)) > probs[k - 1])) continue;
        for (size_t lane = 0; lane < kPanel; ++lane)
            insert(row[i + lane], static_cast<int32_t>(i + lane), k, filled, probs, tokens);
    }
    for (; i < size; ++i) insert(row[i], static_cast<int32_t>(i), k, filled, probs, tokens);

    const F16 high = splat(probs[0]);
    F16 mass = splat(0.0f);
    for (i = 0; i + kPanel <= size; i += kPanel) mass = mass + exp(load(row + i) - high);
    if (i < size) {
        float rest[kPanel];
        for (size_t lane = 0; lane < kPanel; ++lane)
            rest[lane] = i + lane < size ? row[i + lane] : -__builtin_inff();
        mass = mass + exp(load(rest) - high);
    }
    const F16 total = splat(sum(mass));
    for (size_t at = 0; at < k; at += kPanel) {
        const size_t count = k - at < kPanel ? k - at : kPanel;
        float lanes[kPanel] = {};
        for (size_t lane = 0; lane < count; ++lane) lanes[lane] = probs[at + lane];
        store(lanes, exp(load(lanes) - high) / total);
        for (size_t lane = 0; lane < count; ++lane) probs[at + lane] = lanes[lane];
    }
}

}  // namespace

}  // namespace paceline

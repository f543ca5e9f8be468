// Attention of tree nodes over the cache and their own ancestors.
//
// Scores are products with panels of sixteen positions, so each is one sum over the head size.
// A softmax works on a buffer indexed by position: committed ones, then the ancestors by depth,
// as if they were committed. Values are summed position after position; those that a node does
// not see weigh 0, which changes no bit of a sum. So a node gets what plain decoding would get.
#pragma once

#include "floats.hpp"

namespace {

struct AttentionScratch {
    float* queries;  // [D][T]
    float* sums;     // [4][T][16]
    float* scores;   // [T][positions]
    float* by_position;  // [positions]
    float* weights;  // [positions][T]
};

static size_t attention_bytes(size_t queries, size_t positions, size_t head_dim) {
    const size_t width = width_for(queries), room = padded(positions) + kPanel;
    const size_t panels = padded(head_dim) / kPanel;
    const size_t sums = (panels > kUnit ? panels : kUnit) * width * kPanel;
    return (padded(head_dim * width) + sums + 2 * width * room + room + 4 * kPanel) * sizeof(float);
}

INLINE AttentionScratch divide(void* scratch, size_t width, size_t positions, size_t head_dim) {
    const size_t room = padded(positions) + kPanel, panels = padded(head_dim) / kPanel;
    AttentionScratch part;
    part.queries = static_cast<float*>(scratch);
    part.sums = part.queries + padded(head_dim * width);
    part.scores = part.sums + (panels > kUnit ? panels : kUnit) * width * kPanel;
    part.by_position = part.scores + width * room;
    part.weights = part.by_position + room;
    return part;
}

// Where the positions begin that a node of depth `depth` sees.
INLINE size_t window_start(const Attention& job, size_t depth) {
    const size_t position = job.root + depth;
    if (!job.window || position + 1 <= job.window) return 0;
    const size_t first = position + 1 - job.window;
    if (!job.seen) return first;
    if (first >= job.root) return job.length + first - job.root;
    size_t start = 0;
    while (start < job.length && static_cast<size_t>(job.seen[start]) < first) ++start;
    return start;
}

// Softmax over positions start .. position, in place and padded; `from` is a multiple of 16.
static void softmax(float* scores, size_t from, size_t start, size_t position, float cap) {
    const size_t end = padded(position + 1);
    for (size_t i = from; i < start; ++i) scores[i] = -__builtin_inff();
    for (size_t i = position + 1; i < end; ++i) scores[i] = -__builtin_inff();
    F16 high = splat(-__builtin_inff());
    for (size_t i = from; i < end; i += kPanel) {
        F16 value = load(scores + i);
        if (cap != 0.0f) {
            // The mask must survive the cap.
            value = where_less(value, splat(-3e38f), value, softcap(value, cap));
            store(scores + i, value);
        }
        high = max(high, value);
    }
    high = splat(largest(high));
    F16 total = splat(0.0f);
    for (size_t i = from; i < end; i += kPanel) {
        const F16 weight = exp(load(scores + i) - high);
        store(scores + i, weight);
        total = total + weight;
    }
    const F16 scale = splat(1.0f / sum(total));
    for (size_t i = from; i < end; i += kPanel) store(scores + i, load(scores + i) * scale);
}

// One query's scores by node -> its weights by node, in column t of weights [positions][T].
static void weigh(const Attention& job, size_t node, const float* scores, float* by_position,
                  float* weights, size_t width, size_t from, size_t positions) {
    const size_t length = job.length, position = length + static_cast<size_t>(job.depths[node]);
    const size_t start = window_start(job, job.depths[node]);
    const size_t committed = length < position ? length : position;
    if (committed > from)
        std::memcpy(by_position + from, scores + from, (committed - from) * sizeof(float));
    if (job.chain) {
        std::memcpy(by_position + length, scores + length, (node + 1) * sizeof(float));
    } else {
        for (int32_t i = static_cast<int32_t>(node); i >= 0; i = job.parents[i])
            by_position[length + job.depths[i]] = scores[length + i];
    }
    softmax(by_position, from, start, position, job.softcap);
    for (size_t i = from; i < length; ++i) weights[i * width] = by_position[i];
    for (size_t i = length > from ? length : from; i < positions; ++i) weights[i * width] = 0.0f;
    for (int32_t i = static_cast<int32_t>(node); i >= 0; i = job.parents[i]) {
        const size_t at = length + static_cast<size_t>(job.depths[i]);
        if (at < from) break;
        weights[(length + i) * width] = by_position[at];
    }
}

template <int T>
static void attend_tile(const Attention& job, size_t first, size_t last, void* scratch) {
    const size_t dim = job.head_dim, tokens = last - first;
    const size_t last_node = (last - 1) / job.group;
    const size_t positions = job.length + last_node + 1;  // nodes after the last are not seen
    const AttentionScratch part = divide(scratch, T, positions, dim);
    const size_t room = padded(positions) + kPanel;

    size_t from = positions;  // first position that any of the queries sees
    for (size_t node = first / job.group; node <= last_node; ++node) {
        const size_t start = window_start(job, job.depths[node]);
        from = start < from ? start : from;
    }
    from = from / kPanel * kPanel;

    for (size_t t = 0; t < T; ++t) {
        const size_t query = first + (t < tokens ? t : 0);
        const float* q = job.queries + query / job.group * job.query_stride +
                         (job.first_head + query % job.group) * dim;
        for (size_t d = 0; d < dim; ++d) part.queries[d * T + t] = t < tokens ? q[d] : 0.0f;
    }
    const size_t panel_bytes = dim * Fp32Weights::kStep;
    const Sums sums{part.sums, T * kPanel, false};
    const size_t end = padded(positions) / kPanel;
    for (size_t panel = from / kPanel; panel < end; panel += kUnit) {
        const size_t panels = end - panel < kUnit ? end - panel : kUnit;
        const uint8_t* keys = (const uint8_t*)job.keys + panel * panel_bytes;
        multiply_panels<Fp32Weights, T>(keys, panel_bytes, panels, part.queries, dim, sums,
                                        {keys, Fp32Weights::kStep});
        for (size_t p = 0; p < panels; ++p)
            for (size_t t = 0; t < tokens; ++t)
                store(part.scores + t * room + (panel + p) * kPanel,
                      load(part.sums + (p * T + t) * kPanel));
    }
    for (size_t t = 0; t < tokens; ++t)
        weigh(job, (first + t) / job.group, part.scores + t * room, part.by_position,
              part.weights + t, T, from, positions);
    for (size_t t = tokens; t < T; ++t)
        for (size_t i = from; i < positions; ++i) part.weights[i * T + t] = 0.0f;

    const uint8_t* values = (const uint8_t*)(job.values + from * kPanel);
    const size_t value_bytes = job.capacity * Fp32Weights::kStep;
    multiply_panels<Fp32Weights, T>(values, value_bytes, padded(dim) / kPanel,
                                    part.weights + from * T, positions - from, sums,
                                    {values, Fp32Weights::kStep});
    for (size_t t = 0; t < tokens; ++t) {
        const size_t query = first + t;
        float* out = job.out + query / job.group * job.out_stride +
                     (job.first_head + query % job.group) * dim;
        for (size_t d = 0; d < dim; ++d)
            out[d] = part.sums[(d / kPanel * T + t) * kPanel + d % kPanel];
    }
}

static void attend(const Attention& job, size_t first, size_t last, void* scratch) {
    with_width(width_for(last - first), [&](auto t) {
        attend_tile<decltype(t)::value>(job, first, last, scratch);
    });
}

}  // namespace

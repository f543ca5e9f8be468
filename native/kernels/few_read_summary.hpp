// What is kept of the keys of each panel of 16 positions, and what it promises to queries.
#pragma once

#include "kernels/few_read_place.hpp"

namespace paceline {

namespace {

// Pages whose summaries are fetched ahead. They lie far apart, so that the machine foresees none of
// them.
constexpr size_t kPagesAhead = 8;

static size_t summary_bytes(size_t head_dim, const FewRead& rule) {
    if (rule.summary == Summary::none || rule.summary == Summary::centroids) return 0;
    return rule.vectors() * summary_floats(head_dim) * sizeof(float);
}

// Summaries are [D / 4][4 dimensions][4 panels], first means or minima, then maxima or variances.
template <class Number>
static void summarise(const uint8_t* block, size_t panel, size_t head_dim, Summary summary,
                      uint8_t* summaries) {
    float* const low = (float*)summaries;
    float* const high = low + summary_floats(head_dim);
    const uint8_t* keys = block + panel * head_dim * Block<Number>::kStep;
    for (size_t d = 0; d < head_dim; ++d, keys += Block<Number>::kStep) {
        F16 key;
        for (int i = 0; i < kParts; ++i) key.part[i] = Number::read(keys, i, 0);
        if constexpr (Block<Number>::kScaled)
            key = key * load(Block<Number>::key_scales(block, head_dim) + panel * kPanel);
        const size_t at = d * kPanels + panel;
        if (summary == Summary::bounds) {
            low[at] = -largest(splat(0.0f) - key);
            high[at] = largest(key);
            continue;
        }
        low[at] = sum(key) * (1.0f / kPanel);
        if (summary == Summary::mean) continue;
        const F16 off = key - splat(low[at]);
        high[at] = sum(off * off) * (1.0f / kPanel);
    }
    for (size_t d = head_dim; d < padded(head_dim); ++d) {
        low[d * kPanels + panel] = 0.0f;
        if (summary != Summary::mean) high[d * kPanels + panel] = 0.0f;
    }
}

template <class Number>
static void represent(const uint8_t* block, size_t panel, size_t head_dim, const FewRead& rule,
                      const float* wanted, size_t slot, uint8_t* summaries) {
    constexpr size_t kStep = Block<Number>::kStep;
    const uint8_t* const keys = block + panel * head_dim * kStep;
    const auto key_at = [&](size_t d) {
        F16 key;
        for (int i = 0; i < kParts; ++i) key.part[i] = Number::read(keys + d * kStep, i, 0);
        if constexpr (Block<Number>::kScaled)
            key = key * load(Block<Number>::key_scales(block, head_dim) + panel * kPanel);
        return key;
    };
    F16 received = splat(0.0f);
    for (size_t d = 0; d < head_dim; ++d) received = fma(key_at(d), splat(wanted[d]), received);
    float worth[kPanel], others[kPanel];
    size_t chosen[kPanel];
    store(worth, received);
    for (float& other : others) other = 1.0f;
    for (size_t r = 0; r < rule.representatives; ++r) {
        size_t best = kPanel;
        for (size_t i = 0; i < kPanel; ++i)
            if (others[i] != 0.0f && (best == kPanel || worth[i] > worth[best])) best = i;
        others[best] = 0.0f;
        chosen[r] = best;
    }
    const F16 kept = load(others);
    const size_t size = summary_floats(head_dim), left = kPanel - rule.representatives;
    float* const to = (float*)summaries + slot;
    for (size_t d = 0; d < padded(head_dim); ++d) {
        const F16 key = d < head_dim ? key_at(d) : splat(0.0f);
        float lane[kPanel];
        store(lane, key);
        for (size_t r = 0; r < rule.representatives; ++r)
            to[r * size + d * kPanels] = lane[chosen[r]];
        if (left)
            to[rule.representatives * size + d * kPanels] =
                sum(key * kept) * (1.0f / static_cast<float>(left));
    }
}

// Lays a query out for summaries: by dimension four times; for bounds what multiplies the minima
// and the maxima, for variances its square.
static void widen_query(const FewReadNode& read, size_t query, float* wide) {
    const float* from = query_at(read, query);
    const size_t dim = read.job.head_dim, size = summary_floats(dim);
    const Summary summary = read.rule.summary;
    for (size_t d = 0; d < padded(dim); ++d) {
        const float value = d < dim ? from[d] : 0.0f, above = value > 0.0f ? value : 0.0f;
        const float low = summary == Summary::bounds ? value - above : value;
        const float high = summary == Summary::bounds ? above : value * value;
        for (size_t panel = 0; panel < kPanels; ++panel) {
            wide[d * kPanels + panel] = low;
            if (summary != Summary::mean) wide[size + d * kPanels + panel] = high;
        }
    }
}

// Sixteen sums, of four dimensions by four panels, to those of the panels.
INLINE void fold(F16 sums, float* out) {
    float lane[kPanel];
    store(lane, sums);
    for (size_t panel = 0; panel < kPanels; ++panel)
        out[panel] = (lane[panel] + lane[panel + 8]) + (lane[panel + 4] + lane[panel + 12]);
}

// What the panels of a page promise to G queries.
template <int G>
INLINE void promise(const float* summaries, const float* wide, size_t wide_stride, size_t floats,
                    const float* ahead, float* out, size_t out_stride) {
    F16 sums[G][2];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) sums[g][0] = sums[g][1] = splat(0.0f);
    for (size_t i = 0; i < floats; i += 2 * kPanel) {
        __builtin_prefetch(ahead + i, 0, 2);
        __builtin_prefetch(ahead + i + kPanel, 0, 2);
        const F16 even = load(summaries + i), odd = load(summaries + i + kPanel);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            sums[g][0] = fma(even, load(wide + g * wide_stride + i), sums[g][0]);
            sums[g][1] = fma(odd, load(wide + g * wide_stride + i + kPanel), sums[g][1]);
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) fold(sums[g][0] + sums[g][1], out + g * out_stride);
}

// How many panels behind a panel its summary lies: representatives are known only then.
INLINE size_t summary_delay(const FewRead& rule) {
    return rule.summary == Summary::representatives ? rule.following : 0;
}

// Vectors of a summary that have a score each.
INLINE size_t scored_vectors(const FewRead& rule) {
    return rule.summary == Summary::representatives ? rule.vectors() : 1;
}

// Scores of old panels, in whole pages from that of the first one's summary on:
// [query][vector][panel].
static void promise_all(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                        size_t stride) {
    const Attention& job = read.job;
    const size_t wide = 2 * summary_floats(job.head_dim), vectors = scored_vectors(read.rule);
    const size_t floats = read.rule.vectors() * summary_floats(job.head_dim) / vectors;
    const size_t delay = summary_delay(read.rule);
    const size_t begin = (place.old_first + delay) / kPanels;
    const size_t end = (place.old_last + delay + kPanels - 1) / kPanels;
    for (size_t page = begin; page < end; ++page) {
        const size_t next = page + kPagesAhead < end ? page + kPagesAhead : end - 1;
        for (size_t vector = 0; vector < vectors; ++vector) {
            const auto* summaries = (const float*)(job.pages[page] + read.summaries);
            const auto* ahead = (const float*)(job.pages[next] + read.summaries);
            float* out = parts.promised + vector * stride + (page - begin) * kPanels;
            size_t query = 0;
            for (; query + 3 <= job.group; query += 3)
                promise<3>(summaries + vector * floats, parts.wide + query * wide, wide, floats,
                           ahead + vector * floats, out + query * vectors * stride,
                           vectors * stride);
            for (; query < job.group; ++query)
                promise<1>(summaries + vector * floats, parts.wide + query * wide, wide, floats,
                           ahead + vector * floats, out + query * vectors * stride,
                           vectors * stride);
        }
    }
}

// The shares of each query's weight that panels would have, summed over queries. The mean of keys
// that are no representatives stands for all of them.
static void weigh_panels(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                         size_t stride) {
    const size_t count = place.old_last - place.old_first, vectors = scored_vectors(read.rule);
    const size_t skipped = (place.old_first + summary_delay(read.rule)) % kPanels;
    const size_t others = read.rule.representatives < vectors ? read.rule.representatives : vectors;
    const F16 of_others = splat(static_cast<float>(kPanel - others));
    for (size_t i = 0; i < count; i += kPanel) store(parts.worth + i, splat(0.0f));
    for (size_t query = 0; query < read.job.group; ++query) {
        float* const first = parts.promised + query * vectors * stride + skipped;
        F16 most = splat(kNothing);
        for (size_t vector = 0; vector < vectors; ++vector) {
            float* scores = first + vector * stride;
            for (size_t i = count; i < padded(count); ++i) scores[i] = -__builtin_inff();
            for (size_t i = 0; i < count; i += kPanel) most = max(most, load(scores + i));
        }
        const F16 high = splat(largest(most));
        F16 total = splat(0.0f);
        for (size_t i = 0; i < count; i += kPanel) {
            F16 weight = exp(load(first + i) - high);
            for (size_t vector = 1; vector < vectors; ++vector) {
                const F16 more = exp(load(first + vector * stride + i) - high);
                weight = vector == others ? fma(more, of_others, weight) : weight + more;
            }
            store(first + i, weight);
            total = total + weight;
        }
        const F16 scale = splat(1.0f / sum(total));
        for (size_t i = 0; i < count; i += kPanel)
            store(parts.worth + i, fma(load(first + i), scale, load(parts.worth + i)));
    }
}

}  // namespace

}  // namespace paceline

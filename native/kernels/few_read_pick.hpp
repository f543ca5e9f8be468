// Which single positions of a prompt a node reads by the clusters of its keys, and their attention.
#pragma once

#include "kernels/few_read_choice.hpp"
#include "kernels/few_read_scores.hpp"
#include "kernels/few_read_values.hpp"

namespace paceline {

namespace {

constexpr size_t kWider = 2;  // positions of the best coarse clusters, over those that are read

// The largest bits that members of a total of `wanted` reach; 0 where there are fewer.
static int32_t heavy_threshold(const int32_t* bits, const int32_t* members, size_t count,
                               size_t wanted) {
    int32_t low = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const int32_t next = low | int32_t{1} << bit;
        int32_t found = 0;
        for (size_t i = 0; i < count; ++i) found += bits[i] >= next ? members[i] : 0;
        if (static_cast<size_t>(found) >= wanted) low = next;
    }
    return low;
}

// Scores of centroids as sortable bits, in panels of which `some` is set, or in all.
static void score_centroids(const float* centroids, size_t count, size_t dim, const float* query,
                            const uint8_t* some, int32_t* bits) {
    for (size_t panel = 0; panel < padded(count) / kPanel; ++panel) {
        if (some && !some[panel]) continue;
        const float* from = centroids + panel * dim * kPanel;
        F16 even = splat(0.0f), odd = splat(0.0f);
        size_t d = 0;
        for (; d + 2 <= dim; d += 2) {
            even = fma(load(from + d * kPanel), splat(query[d]), even);
            odd = fma(load(from + (d + 1) * kPanel), splat(query[d + 1]), odd);
        }
        if (d < dim) even = fma(load(from + d * kPanel), splat(query[d]), even);
        float scores[kPanel];
        store(scores, even + odd);
        for (size_t i = 0; i < kPanel; ++i) bits[panel * kPanel + i] = sortable(scores[i]);
    }
}

// Positions that may be chosen: low .. high - 1.
struct Choosable {
    size_t low, high;
    bool has(size_t position) const { return position >= low && position < high; }
};

INLINE Choosable choosable(const Place& place) {
    const size_t low = place.old_first * kPanel;
    return {low > place.start ? low : place.start, place.old_last * kPanel};
}

// Members of clusters whose coarse cluster is among the best; the others get none.
static void keep_best_tops(const Clusters& own, const Place& place, const float* query, size_t dim,
                           const FewReadScratch& parts) {
    std::memset(parts.top_members, 0, padded(own.tops) * sizeof(int32_t));
    for (size_t c = 0; c < own.count; ++c)
        parts.top_members[own.parents[c]] += parts.members[c];
    score_centroids(own.top_centroids, own.tops, dim, query, nullptr, parts.top_bits);
    const int32_t low =
        heavy_threshold(parts.top_bits, parts.top_members, own.tops, place.picked * kWider);
    std::memset(parts.some, 0, padded(own.count) / kPanel);
    for (size_t c = 0; c < own.count; ++c) {
        if (parts.top_bits[own.parents[c]] < low) parts.members[c] = 0;
        if (parts.members[c]) parts.some[c / kPanel] = 1;
    }
}

INLINE void mark(uint16_t* masks, size_t first, size_t last) {
    for (size_t row = first; row < last;) {
        const size_t panel = row / kPanel, begin = row % kPanel;
        const size_t end = last - panel * kPanel < kPanel ? last - panel * kPanel : kPanel;
        masks[panel] = static_cast<uint16_t>(masks[panel] | ((1u << end) - (1u << begin)));
        row = panel * kPanel + end;
    }
}

// Marks the rows that a query reads: those of the clusters with the largest scores.
static void mark_best(const Clusters& own, const Place& place, const FewReadScratch& parts,
                      uint16_t* masks) {
    const Choosable free = choosable(place);
    const int32_t low = heavy_threshold(parts.bits, parts.members, own.count, place.picked);
    size_t above = 0;
    for (size_t c = 0; c < own.count; ++c) {
        if (!parts.members[c] || parts.bits[c] <= low) continue;
        above += static_cast<size_t>(parts.members[c]);
        mark(masks, static_cast<size_t>(own.starts[c]), static_cast<size_t>(own.starts[c + 1]));
    }
    const auto clear = [&](size_t position) {
        const auto row = static_cast<size_t>(own.rows[position]);
        masks[row / kPanel] = static_cast<uint16_t>(masks[row / kPanel] & ~(1u << row % kPanel));
    };
    for (size_t position = 0; position < free.low; ++position) clear(position);
    for (size_t position = free.high; position < own.fixed; ++position) clear(position);
    size_t left = place.picked > above ? place.picked - above : 0;
    for (size_t c = 0; c < own.count && left; ++c) {
        if (!parts.members[c] || parts.bits[c] != low) continue;
        for (int32_t row = own.starts[c]; row < own.starts[c + 1] && left; ++row) {
            if (!free.has(static_cast<size_t>(own.places[row]))) continue;
            mark(masks, static_cast<size_t>(row), static_cast<size_t>(row) + 1);
            --left;
        }
    }
}

// Chooses rows for every query of a kv head; lists the panels in which some are. Returns how many.
static size_t pick_rows(const FewReadNode& read, const Place& place, const FewReadScratch& parts) {
    const Clusters& own = *read.clusters;
    const Choosable free = choosable(place);
    const size_t panels = own.fixed / kPanel, dim = read.job.head_dim;
    for (size_t c = 0; c < own.count; ++c)
        parts.choosable[c] = own.starts[c + 1] - own.starts[c];
    for (size_t position = 0; position < free.low; ++position)
        --parts.choosable[own.labels[position]];
    for (size_t position = free.high; position < own.fixed; ++position)
        --parts.choosable[own.labels[position]];
    std::memset(parts.masks, 0, read.job.group * panels * sizeof(uint16_t));
    for (size_t query = 0; query < read.job.group; ++query) {
        std::memcpy(parts.members, parts.choosable, own.count * sizeof(int32_t));
        if (own.tops) keep_best_tops(own, place, query_at(read, query), dim, parts);
        score_centroids(own.centroids, own.count, dim, query_at(read, query),
                        own.tops ? parts.some : nullptr, parts.bits);
        mark_best(own, place, parts, parts.masks + query * panels);
    }
    size_t count = 0;
    for (size_t panel = 0; panel < panels; ++panel) {
        uint16_t some = 0;
        for (size_t query = 0; query < read.job.group; ++query)
            some = static_cast<uint16_t>(some | parts.masks[query * panels + panel]);
        if (some) parts.picked[count++] = static_cast<int32_t>(panel);
    }
    return count;
}

// Adds the rows that a tile of T queries chose to its totals.
template <class Number, int T>
static void read_picked(const FewReadNode& read, const FewReadScratch& parts, size_t first,
                        size_t queries, size_t count) {
    const size_t panels = read.clusters->fixed / kPanel;
    FewReadNode of_rows = read;
    of_rows.job.pages = read.clusters->pages;
    FewReadScratch own = parts;
    own.panels = parts.picked;
    own.scores = parts.picked_scores;
    score_list<Number, T>(of_rows.job, own.panels, count, own.queries, own.scores);
    for (size_t i = 0; i < count; ++i)
        for (size_t t = 0; t < queries; ++t) {
            const uint16_t mask =
                parts.masks[(first + t) * panels + static_cast<size_t>(own.panels[i])];
            float* at = own.scores + (i * T + t) * kPanel;
            for (size_t lane = 0; lane < kPanel; ++lane)
                at[lane] = mask >> lane & 1 ? at[lane] : -__builtin_inff();
        }
    Place rows{};  // no tail behind them
    rows.whole = (panels + kPanels - 1) / kPanels * kPanels;
    rows.last = rows.whole - 1;
    Reader<Number, T>{of_rows, rows, own, queries, count}.run();
}

}  // namespace

}  // namespace paceline

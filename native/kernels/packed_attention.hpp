// Attention over positions in 4 or 3 bits.
//
// A node at position p sees positions below p / 32 * 32 as they are rounded, and the others, its
// own included, as rows in fp16: what it sees is a function of its path and of p alone. The rounded
// positions are taken in spans as in attention.hpp; the rows in fp16 are one span more, the last.
//
// A chain rounds the groups that it fills where they will lie in the cache. Groups that are filled
// inside a tree differ from path to path: they lie in blocks of their own, see ClosedBlock.
#pragma once

#include "kernels/packed_cache.hpp"

namespace paceline {

namespace {

// Slots of fp16 rows: those of the open group, then the nodes.
INLINE size_t open_slots(const PackedAttention& job) { return kCacheGroup + padded(job.nodes); }

INLINE size_t position_of(const PackedAttention& job, size_t node) {
    return job.root + static_cast<size_t>(job.depths[node]);
}

// Where the rounded positions end for a node at `position`.
INLINE size_t closed_end(size_t position) { return position / kCacheGroup * kCacheGroup; }

// The block of columns `begin` .. `begin` + 63 on the path of a query.
INLINE const uint8_t* packed_block(const PackedAttention& job, size_t query, size_t begin) {
    const size_t block = begin / kCacheBlock;
    if (job.closed_of) {
        int32_t at = job.closed_of[(job.first + query) / job.group];
        while (at >= 0 && job.closed[at].block > block) at = job.closed[at].before;
        if (at >= 0 && job.closed[at].block == block)
            return job.closed_data + static_cast<size_t>(at) * job.closed_stride;
    }
    return block_at(job, begin);
}

// What a call needs besides: rows of queries, weights and scaled numbers, each by query.
struct PackedScratch {
    float* rows;     // [query][K]
    float* weights;  // [T][kSpan]
    float* scaled;   // [T][K or 64]
};

// Where the columns of block `begin` end that a query sees in `block`: 0, if it sees another.
INLINE size_t stop_of(const PackedAttention& job, const AttentionScratch& parts, size_t query,
                      size_t begin, const uint8_t* block) {
    const size_t stop = static_cast<size_t>(parts.last[query]) + 1;
    if (stop <= begin || (job.closed_of && packed_block(job, query, begin) != block)) return 0;
    return stop < begin + kCacheBlock ? stop : begin + kCacheBlock;
}

// Where the columns of a block end that some query sees: behind it, it may hold nothing yet.
INLINE size_t count_of(const PackedAttention& job, const Group& group,
                       const AttentionScratch& parts, size_t begin, const uint8_t* block) {
    size_t end = begin + kCacheGroup;
    for (size_t t = 0; t < group.count; ++t) {
        const size_t stop = stop_of(job, parts, group.first + t, begin, block);
        end = stop > end ? stop : end;
    }
    return end - begin;
}

// Scores of the columns of a block, for the queries that see it, to `weights` [T][kSpan].
template <int kBits, int T>
static void score_packed(const PackedAttention& job, const Group& group,
                         const AttentionScratch& parts, const PackedScratch& packed, size_t begin,
                         const uint8_t* block) {
    using Layout = PackedBlock<kBits>;
    const size_t count = count_of(job, group, parts, begin, block);
    const size_t inputs = whole_groups(job.head_dim);
    const uint8_t* next = block_after(job, begin);
    for (size_t g = 0; g < count / kCacheGroup; ++g) {
        const size_t at = Layout::keys_at(job.head_dim, g);
        multiply_packed<kBits, T>(block + at, kGroupPanels, inputs, inputs, group.queries, inputs,
                                  packed.scaled,
                                  {parts.scores + g * kGroupPanels * T * kPanel, T * kPanel, false},
                                  next + at);
    }
    for (size_t t = 0; t < group.count; ++t) {
        const size_t query = group.first + t;
        const auto start = static_cast<size_t>(parts.start[query]);
        const size_t stop = stop_of(job, parts, query, begin, block);
        float* out = packed.weights + t * kSpan + begin % kSpan;
        for (size_t p = 0; p < count / kPanel && stop; ++p) {
            F16 scores = load(parts.scores + (p * T + t) * kPanel);
            if (job.softcap != 0.0f) scores = softcap(scores, job.softcap);
            if (start > begin || stop < begin + count)
                scores = hide(scores, begin + p * kPanel, start, stop - 1, parts.sinks);
            store(out + p * kPanel, scores);
        }
    }
}

// Values of a block times the weights of the queries that see it.
template <int kBits, int T>
static void weigh_packed(const PackedAttention& job, const Group& group,
                         const AttentionScratch& parts, const PackedScratch& packed, size_t begin,
                         const uint8_t* block) {
    using Layout = PackedBlock<kBits>;
    const size_t count = count_of(job, group, parts, begin, block);
    const size_t panels = padded(job.head_dim) / kPanel;
    const uint8_t* next = block_after(job, begin);
    const float* weights = packed.weights + begin % kSpan;
    size_t stride = kSpan;
    float own[T * kCacheBlock];
    if (job.closed_of) {  // others weigh nothing
        std::memset(own, 0, sizeof(own));
        for (size_t t = 0; t < group.count; ++t)
            if (stop_of(job, parts, group.first + t, begin, block))
                std::memcpy(own + t * kCacheBlock, weights + t * kSpan, count * sizeof(float));
        weights = own;
        stride = kCacheBlock;
    }
    for (size_t panel = 0; panel < panels; panel += kGroupPanels) {
        const size_t left = panels - panel < kGroupPanels ? panels - panel : kGroupPanels;
        const size_t at = Layout::values_at(job.head_dim, panel / kGroupPanels);
        multiply_packed<kBits, T>(block + at, left, kCacheBlock, count, weights, stride,
                                  packed.scaled,
                                  {group.sums + panel * T * kPanel, T * kPanel, true}, next + at);
    }
}

// Calls use(block) for each block that some query sees as columns `begin` .. `begin` + 63.
template <class Use>
INLINE void each_block(const PackedAttention& job, const Group& group,
                       const AttentionScratch& parts, size_t begin, Use use) {
    if (!job.closed_of || begin + kCacheBlock <= closed_end(job.length))
        return use(block_at(job, begin));
    for (size_t t = 0; t < group.count; ++t) {
        const uint8_t* block = packed_block(job, group.first + t, begin);
        if (!stop_of(job, parts, group.first + t, begin, block)) continue;
        bool seen = false;
        for (size_t other = 0; other < t && !seen; ++other)
            seen = stop_of(job, parts, group.first + other, begin, block) > 0;
        if (!seen) use(block);
    }
}

// The weights of a span from its scores: their largest is known before any is taken.
INLINE void weigh_scores(float* scores, float* high, float* lanes) {
    F16 top = splat(kNothing);
    for (size_t at = 0; at < kSpan; at += kPanel) top = max(top, load(scores + at));
    *high = largest(top);
    const F16 highest = splat(*high);
    F16 total = splat(0.0f);
    for (size_t at = 0; at < kSpan; at += kPanel) {
        const F16 weight = exp(load(scores + at) - highest);
        store(scores + at, weight);
        total = total + weight;
    }
    store(lanes, total);
}

// One span of rounded positions.
template <int kBits, int T>
static void see_packed(const PackedAttention& job, const Group& group,
                       const AttentionScratch& parts, const PackedScratch& packed, size_t span) {
    const size_t first = span * kSpan, end = first + kSpan < group.to ? first + kSpan : group.to;
    const F16 hidden = splat(-__builtin_inff());
    for (size_t t = 0; t < group.count; ++t)
        for (size_t at = 0; at < kSpan; at += kPanel)
            store(packed.weights + t * kSpan + at, hidden);
    for (size_t t = group.count; t < T; ++t)
        std::memset(packed.weights + t * kSpan, 0, kSpan * sizeof(float));
    for (size_t begin = first; begin < end; begin += kCacheBlock) {
        if (begin + kCacheBlock <= group.from && begin >= parts.sinks) continue;
        each_block(job, group, parts, begin, [&](const uint8_t* block) INLINE_LAMBDA {
            score_packed<kBits, T>(job, group, parts, packed, begin, block);
        });
    }
    for (size_t t = 0; t < group.count; ++t) {
        const size_t query = group.first + t;
        weigh_scores(packed.weights + t * kSpan, parts.high + query, parts.lanes + query * kPanel);
    }
    for (size_t begin = first; begin < end; begin += kCacheBlock) {
        if (begin + kCacheBlock <= group.from && begin >= parts.sinks) continue;
        each_block(job, group, parts, begin, [&](const uint8_t* block) INLINE_LAMBDA {
            weigh_packed<kBits, T>(job, group, parts, packed, begin, block);
        });
    }
}

// Panels of fp16 rows that a group of queries needs: those of the open group, and of the nodes.
struct OpenRows {
    size_t committed;    // rows of the open group
    size_t first, last;  // nodes, the first a multiple of 16
};

INLINE OpenRows open_rows(const PackedAttention& job, const Group& group) {
    const size_t low = (job.first + group.first) / job.group;
    const size_t high = (job.first + group.first + group.count - 1) / job.group;
    OpenRows rows{job.length % kCacheGroup, 0, high + 1};
    if (!job.chain) return rows;
    const size_t begin = closed_end(position_of(job, low));
    if (begin > job.root) {
        rows.committed = 0;
        rows.first = (begin - job.root) / kPanel * kPanel;
    }
    return rows;
}

// Calls use(panel, slot, rows) for each panel of fp16 rows.
template <class Use>
INLINE void each_open_panel(const PackedAttention& job, const OpenRows& rows, Use use) {
    for (size_t row = 0; row < rows.committed; row += kPanel) {
        const size_t left = rows.committed - row;
        use(job.open[row / kPanel] + job.offset, row, left < kPanel ? left : kPanel);
    }
    for (size_t node = rows.first; node < rows.last; node += kPanel) {
        const size_t left = rows.last - node, slot = kCacheGroup + node;
        use(job.open[slot / kPanel] + job.offset, slot, left < kPanel ? left : kPanel);
    }
}

// Calls use(slot, place) for each fp16 row that a node sees, `place` positions behind the others.
template <class Use>
INLINE void each_open_row(const PackedAttention& job, size_t node, size_t start, Use use) {
    const size_t position = position_of(job, node), begin = closed_end(position);
    const size_t open = closed_end(job.length);
    if (begin == open)
        for (size_t row = begin; row < job.length; ++row)
            if (row >= start || row < job.sinks) use(row - open, row - begin);
    for (int32_t i = static_cast<int32_t>(node); i >= 0; i = job.parents[i]) {
        const size_t at = position_of(job, static_cast<size_t>(i));
        if (at < begin) break;
        if (at >= start || at < job.sinks) use(kCacheGroup + static_cast<size_t>(i), at - begin);
    }
}

template <int T>
static void see_open(const PackedAttention& job, const Group& group, const AttentionScratch& parts) {
    using W = FloatWeights<Fp16>;
    const OpenRows rows = open_rows(job, group);
    const size_t room = open_slots(job), dim = job.head_dim;
    each_open_panel(job, rows, [&](const uint8_t* panel, size_t slot, size_t) INLINE_LAMBDA {
        multiply_panels<W, T>(panel, dim * W::kStep, 1, group.queries, dim,
                              {parts.scores, T * kPanel, false}, {panel, 0});
        for (size_t t = 0; t < group.count; ++t)
            store(parts.slots + t * room + slot, load(parts.scores + t * kPanel));
    });
    std::memset(parts.weights, 0, room * T * sizeof(float));
    for (size_t t = 0; t < group.count; ++t) {
        const size_t query = group.first + t, node = (job.first + query) / job.group;
        const auto start = static_cast<size_t>(parts.start[query]);
        const float* slots = parts.slots + t * room;
        float columns[kCacheBlock];
        for (float& column : columns) column = -__builtin_inff();
        each_open_row(job, node, start,
                      [&](size_t slot, size_t at) INLINE_LAMBDA { columns[at] = slots[slot]; });
        F16 scores[kPanels];
        for (size_t p = 0; p < kPanels; ++p) {
            scores[p] = load(columns + p * kPanel);
            if (job.softcap == 0.0f) continue;
            const F16 none = splat(kNothing);  // a cap would make -inf a score
            scores[p] = where_less(scores[p], none, scores[p], softcap(scores[p], job.softcap));
        }
        const float scale = absorb(scores, parts.high + query, parts.lanes + query * kPanel);
        rescale<T>(group.sums, t, dim, scale);
        for (size_t p = 0; p < kPanels; ++p) store(columns + p * kPanel, scores[p]);
        each_open_row(job, node, start, [&](size_t slot, size_t at) INLINE_LAMBDA {
            parts.weights[slot * T + t] = columns[at];
        });
    }
    each_open_panel(job, rows, [&](const uint8_t* panel, size_t slot, size_t count) INLINE_LAMBDA {
        multiply_panels<W, T>(panel + dim * W::kStep, kPanel * W::kStep, padded(dim) / kPanel,
                              parts.weights + slot * T, count, {group.sums, T * kPanel, true},
                              {panel, 0});
    });
}

// As `divide`, with room for inputs in whole groups and for rows that are not rounded.
INLINE size_t divide_packed(const PackedAttention& job, size_t queries, float* at,
                            AttentionScratch* parts, PackedScratch* packed) {
    const size_t width = width_for(queries), count = room(tiling(queries, kWidest));
    const size_t slots = kCacheBlock + padded(job.nodes), dim = job.head_dim;
    const auto take = [&](size_t floats) {
        float* start = at;
        at += padded(floats);
        return start;
    };
    float* const begin = at;
    parts->queries = take(dim * count);
    parts->sums = take(padded(dim) * count);
    parts->totals = take(state_floats(dim) * count);
    parts->high = take(count);
    parts->start = (int32_t*)take(count);
    parts->last = (int32_t*)take(count);
    parts->lanes = take(kPanel * count);
    parts->scores = take(kCacheBlock * width);
    parts->weights = take(slots * width);
    parts->slots = take(slots * width);
    packed->rows = take(whole_groups(dim) * count);
    packed->weights = take(kSpan * width);
    packed->scaled = take((whole_groups(dim) > kCacheBlock ? whole_groups(dim) : kCacheBlock) * width);
    return static_cast<size_t>(at - begin);
}

static size_t packed_attention_bytes(const PackedAttention& job, size_t queries) {
    AttentionScratch parts;
    PackedScratch packed;
    return divide_packed(job, queries, nullptr, &parts, &packed) * sizeof(float);
}

// Adds what a span gave to the totals of its queries, or to its states.
static void merge_packed(const PackedAttention& job, const Tiling& tiles,
                         const AttentionScratch& parts, size_t span) {
    const size_t dim = job.head_dim;
    for (size_t tile = 0; tile < tiles.count; ++tile) {
        const size_t width = tiles.width_of(tile), first = tile * tiles.width;
        for (size_t t = 0; t < tiles.tokens(tile); ++t) {
            float* total = parts.totals + (first + t) * state_floats(dim);
            if (job.states) {
                total = state_at(job, job.first + first + t, span);
                clear(total, dim);
            }
            merge(total, parts.high[first + t], parts.lanes + (first + t) * kPanel,
                  parts.sums + first * padded(dim) + t * kPanel, width * kPanel, dim);
        }
    }
}

// One span, for every tile. The open rows are taken with queries laid out for them.
template <int kBits>
static void see_packed_span(const PackedAttention& job, const Tiling& tiles,
                            const AttentionScratch& parts, const PackedScratch& packed,
                            size_t span) {
    const bool open = !job.shared_nodes && span + 1 == job.spans;
    for (size_t tile = 0; tile < tiles.count; ++tile) {
        Group group = group_of(job, parts, tiles, tile);
        const bool near = (span + 1) * kSpan > group.from || span * kSpan < parts.sinks;
        if (!open && (!near || span * kSpan >= group.to)) continue;
        if (open)
            load_queries(job, group, tiles.width_of(tile));
        else
            group.queries = packed.rows + group.first * whole_groups(job.head_dim);
        with_width(tiles.width_of(tile), [&](auto width) {
            constexpr int T = decltype(width)::value;
            open ? see_open<T>(job, group, parts) : see_packed<kBits, T>(job, group, parts, packed, span);
        });
    }
}

// The queries of a call, and what they see: columns start .. last of the
// rounded positions.
static void begin_packed(const PackedAttention& job, const Tiling& tiles,
                         const AttentionScratch& parts, const PackedScratch& packed) {
    const size_t dim = job.head_dim, whole = whole_groups(dim);
    std::memset(packed.rows, 0, whole * room(tiles) * sizeof(float));
    for (size_t query = 0; query < job.count; ++query) {
        const size_t node = (job.first + query) / job.group;
        const size_t depth = job.shared_nodes ? job.shared_nodes[node].column
                                              : static_cast<size_t>(job.depths[node]);
        const float* queries = job.shared_nodes ? job.shared_nodes[node].queries
                                                : job.queries + node * job.query_stride;
        std::memcpy(packed.rows + query * whole,
                    queries + (job.first_head + (job.first + query) % job.group) * dim,
                    dim * sizeof(float));
        parts.start[query] = static_cast<int32_t>(window_start(job, depth));
        parts.last[query] = static_cast<int32_t>(closed_end(job.length + depth)) - 1;
        clear(parts.totals + query * state_floats(dim), dim);
    }
}

template <int kBits>
static void attend_packed(const Attention& given, size_t first_span, size_t last_span,
                          void* scratch) {
    const auto& job = static_cast<const PackedAttention&>(given);
    const Tiling tiles = tiling(job.count, kWidest);
    const size_t dim = job.head_dim, state = state_floats(dim);
    AttentionScratch parts;
    PackedScratch packed;
    divide_packed(job, job.count, static_cast<float*>(scratch), &parts, &packed);
    parts.sinks = job.sinks;  // rows of such a cache are never evicted
    begin_packed(job, tiles, parts, packed);
    for (size_t span = first_span; span < last_span; ++span) {
        for (size_t query = 0; query < job.count; ++query) parts.high[query] = kNothing;
        std::memset(parts.lanes, 0, kPanel * job.count * sizeof(float));
        std::memset(parts.sums, 0, padded(dim) * room(tiles) * sizeof(float));
        see_packed_span<kBits>(job, tiles, parts, packed, span);
        merge_packed(job, tiles, parts, span);
    }
    if (job.states) return;
    for (size_t query = 0; query < job.count; ++query)
        finish(job, job.first + query, parts.totals + query * state);
}

}  // namespace

}  // namespace paceline

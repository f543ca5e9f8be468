// Attention of tree nodes over the cache and their own ancestors.
//
// Columns are what a node may see, in order of position: the committed rows, then its ancestors
// by depth, as if they were committed. They are taken in aligned blocks of 64. A block is read
// once for all queries of a call; each query has an online softmax (Milakov and Gimelshein 2018,
// "Online normalizer calculation for softmax"), which starts anew in every aligned span of blocks,
// so that spans can be shared among threads; spans are merged in order. What a query does not see
// weighs 0 and changes no bit. So every node gets what plain decoding would get.
#pragma once

#include "kernels/cached.hpp"

namespace paceline {

namespace {

constexpr float kNothing = -3e38f;  // the largest score of no scores; finite, so that exp works
constexpr size_t kPanels = kCacheBlock / kPanel;

// Floats of a query's state: its largest score (one used), the sum of its weights by lane, and
// its values.
static size_t state_floats(size_t head_dim) { return 2 * kPanel + padded(head_dim); }

struct AttentionScratch {
    float* queries;  // [tile][D][T]
    float* sums;     // [tile][D / 16][T][16]
    float* totals;   // [query][state]: of the spans so far
    float* high;     // [query]
    int32_t* start;  // [query], the first column that it sees
    int32_t* last;   // [query], the last one: itself
    float* lanes;    // [query][16]
    float* scores;   // [4][T][16]
    float* weights;  // [64 or slots][T]
    float* slots;    // [T][slots]: scores of a tree's rows
    size_t sinks;    // first columns, which all queries see
};

// Rows of a tree and of the block in which it begins.
INLINE size_t slots_of(const Attention& job) {
    return padded(job.length % kCacheBlock + job.nodes) + kCacheBlock;
}

INLINE size_t divide(const Attention& job, size_t queries, float* at, AttentionScratch* parts) {
    const size_t width = width_for(queries), count = room(tiling(queries, kWidest));
    const size_t slots = slots_of(job), dim = job.head_dim;
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
    return static_cast<size_t>(at - begin);
}

static size_t attention_bytes(const Attention& job, size_t queries) {
    AttentionScratch parts;
    return divide(job, queries, nullptr, &parts) * sizeof(float);
}

// Where the columns begin that a node of depth `depth` sees.
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

// The columns of the first positions, which are seen behind a window, too.
INLINE size_t sink_columns(const Attention& job) {
    if (!job.sinks || !job.seen) return job.sinks;
    size_t count = 0;
    while (count < job.length && static_cast<size_t>(job.seen[count]) < job.sinks) ++count;
    const size_t nodes = job.root < job.sinks ? job.sinks - job.root : 0;
    return count == job.length ? count + nodes : count;
}

// A few queries that are computed together.
struct Group {
    size_t first, count;  // queries of the call
    size_t from, to;      // columns that any of them sees
    float* queries;
    float* sums;
};

// Takes 64 scores into a query's softmax. They become weights; returns what earlier values are to
// be multiplied with.
INLINE float absorb(F16 (&scores)[kPanels], float* high, float* lanes) {
    const float top = largest(max(max(scores[0], scores[1]), max(scores[2], scores[3])));
    const float next = top > *high ? top : *high;
    float scale = 1.0f;
    if (next > *high) {
        float first[kPanel];
        store(first, exp(splat(*high - next)));
        scale = first[0];
    }
    for (F16& score : scores) score = exp(score - splat(next));
    const F16 total = (scores[0] + scores[1]) + (scores[2] + scores[3]);
    store(lanes, fma(load(lanes), splat(scale), total));
    *high = next;
    return scale;
}

template <int T>
INLINE void rescale(float* sums, size_t t, size_t head_dim, float scale) {
    if (scale == 1.0f) return;
    for (size_t panel = 0; panel < padded(head_dim) / kPanel; ++panel) {
        float* at = sums + (panel * T + t) * kPanel;
        store(at, load(at) * splat(scale));
    }
}

// Hides the columns outside start .. last but the first `sinks`; the first lane is column `first`.
INLINE F16 hide(F16 scores, size_t first, size_t start, size_t last, size_t sinks = 0) {
    const F16 hidden = splat(-__builtin_inff());
    const F16 column = lane_index() + splat(static_cast<float>(first));
    F16 shown = where_less(column, splat(static_cast<float>(start)), hidden, scores);
    if (first < sinks) shown = where_less(column, splat(static_cast<float>(sinks)), scores, shown);
    return where_less(splat(static_cast<float>(last)), column, hidden, shown);
}

INLINE const uint8_t* block_at(const Attention& job, size_t row) {
    return job.pages[row / kCacheBlock] + job.offset;
}

// What to fetch while the block of `row` is used.
INLINE const uint8_t* block_after(const Attention& job, size_t row) {
    const size_t next = row / kCacheBlock + 1;
    return job.pages[next < job.last_page ? next : job.last_page] + job.offset;
}

template <class Number, int T>
INLINE void multiply_keys(const Attention& job, size_t row, size_t count, const float* queries,
                          float* scores) {
    using W = FloatWeights<Number>;
    multiply_panels<W, T>(block_at(job, row), job.head_dim * W::kStep, padded(count) / kPanel,
                          queries, job.head_dim, {scores, T * kPanel, false},
                          {block_after(job, row), W::kStep});
}

template <class Number, int T>
INLINE void multiply_values(const Attention& job, size_t row, size_t count, const float* weights,
                            float* sums) {
    using W = FloatWeights<Number>;
    const size_t values = Block<Number>::values_at(job.head_dim);
    multiply_panels<W, T>(block_at(job, row) + values, kCacheBlock * W::kStep,
                          padded(job.head_dim) / kPanel, weights, count, {sums, T * kPanel, true},
                          {block_after(job, row) + values, W::kStep});
}

// Scores of 16 rows of a block, without what is hidden.
template <class Number, int T>
INLINE F16 score(const Attention& job, const uint8_t* block, const float* scores, size_t panel,
                 size_t t) {
    F16 found = load(scores + (panel * T + t) * kPanel);
    if constexpr (Block<Number>::kScaled)
        found = found * load(Block<Number>::key_scales(block, job.head_dim) + panel * kPanel);
    return job.softcap == 0.0f ? found : softcap(found, job.softcap);
}

// Rows are columns: committed ones, and the nodes of a chain.
template <class Number, int T>
static void see_block(const Attention& job, const Group& group, const AttentionScratch& parts,
                      size_t begin) {
    const size_t end = begin + kCacheBlock < group.to ? begin + kCacheBlock : group.to;
    const size_t count = end - begin, panels = padded(count) / kPanel;
    const uint8_t* block = block_at(job, begin);
    multiply_keys<Number, T>(job, begin, count, group.queries, parts.scores);
    for (size_t t = 0; t < group.count; ++t) {
        const size_t query = group.first + t;
        const auto start = static_cast<size_t>(parts.start[query]);
        const auto last = static_cast<size_t>(parts.last[query]);
        F16 scores[kPanels];
        for (size_t p = 0; p < kPanels; ++p) scores[p] = splat(-__builtin_inff());
        for (size_t p = 0; p < panels; ++p)
            scores[p] = score<Number, T>(job, block, parts.scores, p, t);
        if (start > begin || last < begin + kCacheBlock)
            for (size_t p = 0; p < panels; ++p)
                scores[p] = hide(scores[p], begin + p * kPanel, start, last, parts.sinks);
        const float scale = absorb(scores, parts.high + query, parts.lanes + query * kPanel);
        rescale<T>(group.sums, t, job.head_dim, scale);
        for (size_t p = 0; p < panels; ++p) {
            if constexpr (Block<Number>::kScaled)
                scores[p] = scores[p] * load(Block<Number>::value_scales(block, job.head_dim) +
                                             p * kPanel);
            float lane[kPanel];
            store(lane, scores[p]);
            for (size_t i = 0; i < kPanel; ++i) parts.weights[(p * kPanel + i) * T + t] = lane[i];
        }
    }
    for (size_t t = group.count; t < T; ++t)
        for (size_t i = 0; i < count; ++i) parts.weights[i * T + t] = 0.0f;
    multiply_values<Number, T>(job, begin, count, parts.weights, group.sums);
}

// Scores of the rows of a tree, from the block on in which it begins: [t][slot].
template <class Number, int T>
static void score_slots(const Attention& job, const Group& group, const AttentionScratch& parts,
                        size_t first, size_t end) {
    const size_t room = slots_of(job);
    for (size_t begin = first; begin < end; begin += kCacheBlock) {
        const size_t count = end - begin < kCacheBlock ? end - begin : kCacheBlock;
        const uint8_t* block = block_at(job, begin);
        multiply_keys<Number, T>(job, begin, count, group.queries, parts.scores);
        for (size_t t = 0; t < group.count; ++t)
            for (size_t p = 0; p < padded(count) / kPanel; ++p)
                store(parts.slots + t * room + begin - first + p * kPanel,
                      score<Number, T>(job, block, parts.scores, p, t));
    }
}

// Calls use(row, column) for what a node sees of 64 columns of a tree: the first `sinks`, and those
// from `start` on.
template <class Use>
INLINE void each_seen(const Attention& job, size_t node, size_t start, size_t sinks, size_t begin,
                      Use use) {
    const size_t end = begin + kCacheBlock;
    const size_t committed = job.length < end ? job.length : end;
    for (size_t row = begin; row < committed && row < start && row < sinks; ++row) use(row, row);
    for (size_t row = begin > start ? begin : start; row < committed; ++row) use(row, row);
    for (int32_t i = static_cast<int32_t>(node); i >= 0; i = job.parents[i]) {
        const size_t column = job.length + static_cast<size_t>(job.depths[i]);
        if (column < begin || (column < start && !sinks)) break;
        if (column < end && (column >= start || column < sinks))
            use(job.length + static_cast<size_t>(i), column);
    }
}

// Columns of a tree lie where its branches put them, so each query finds its own.
template <class Number, int T>
static void see_tree(const Attention& job, const Group& group, const AttentionScratch& parts,
                     size_t begin) {
    const size_t first = job.length / kCacheBlock * kCacheBlock, room = slots_of(job);
    const size_t last = (job.first + group.first + group.count - 1) / job.group;
    const size_t end = job.length + last + 1;  // rows after the last are not seen
    score_slots<Number, T>(job, group, parts, first, end);
    std::memset(parts.weights, 0, (end - first) * T * sizeof(float));
    for (size_t t = 0; t < group.count; ++t) {
        const size_t query = group.first + t, node = (job.first + query) / job.group;
        const auto start = static_cast<size_t>(parts.start[query]);
        float columns[kCacheBlock];
        for (float& column : columns) column = -__builtin_inff();
        const float* slots = parts.slots + t * room;
        each_seen(job, node, start, parts.sinks, begin, [&](size_t row, size_t column) {
            columns[column - begin] = slots[row - first];
        });
        F16 scores[kPanels];
        for (size_t p = 0; p < kPanels; ++p) scores[p] = load(columns + p * kPanel);
        const float scale = absorb(scores, parts.high + query, parts.lanes + query * kPanel);
        rescale<T>(group.sums, t, job.head_dim, scale);
        for (size_t p = 0; p < kPanels; ++p) store(columns + p * kPanel, scores[p]);
        each_seen(job, node, start, parts.sinks, begin, [&](size_t row, size_t column) {
            float weight = columns[column - begin];
            if constexpr (Block<Number>::kScaled) {
                const float* scales = Block<Number>::value_scales(block_at(job, row), job.head_dim);
                weight *= scales[row % kCacheBlock];
            }
            parts.weights[(row - first) * T + t] = weight;
        });
    }
    for (size_t row = first; row < end; row += kCacheBlock)
        multiply_values<Number, T>(job, row, end - row < kCacheBlock ? end - row : kCacheBlock,
                                   parts.weights + (row - first) * T, group.sums);
}

// Adds what a span gave to what those before it gave.
static void merge(float* total, float high, const float* lanes, const float* sums, size_t stride,
                  size_t head_dim) {
    const float next = high > total[0] ? high : total[0];
    float scales[kPanel] = {total[0] - next, high - next};
    store(scales, exp(load(scales)));
    const F16 old = splat(scales[0]), fresh = splat(scales[1]);
    total[0] = next;
    float* at = total + kPanel;
    store(at, fma(load(at), old, load(lanes) * fresh));
    for (size_t d = 0; d < padded(head_dim); d += kPanel) {
        at += kPanel;
        store(at, fma(load(at), old, load(sums) * fresh));
        sums += stride;
    }
}

static void clear(float* total, size_t head_dim) {
    std::memset(total, 0, state_floats(head_dim) * sizeof(float));
    total[0] = kNothing;
}

// Query `query` of the job gets its values.
static void finish(const Attention& job, size_t query, const float* total) {
    const F16 scale = splat(1.0f / sum(load(total + kPanel)));
    float* out = job.out + query / job.group * job.out_stride +
                 (job.first_head + query % job.group) * job.head_dim;
    for (size_t d = 0; d < job.head_dim; d += kPanel) {
        float lane[kPanel];
        store(lane, load(total + 2 * kPanel + d) * scale);
        for (size_t i = 0; i < kPanel && d + i < job.head_dim; ++i) out[d + i] = lane[i];
    }
}

INLINE Group group_of(const Attention& job, const AttentionScratch& parts, const Tiling& tiles,
                      size_t tile) {
    Group group{tile * tiles.width, tiles.tokens(tile), SIZE_MAX, 0, nullptr, nullptr};
    group.queries = parts.queries + tile * tiles.width * job.head_dim;
    group.sums = parts.sums + tile * tiles.width * padded(job.head_dim);
    for (size_t t = 0; t < group.count; ++t) {
        const auto start = static_cast<size_t>(parts.start[group.first + t]);
        const auto end = static_cast<size_t>(parts.last[group.first + t]) + 1;
        group.from = start < group.from ? start : group.from;
        group.to = end > group.to ? end : group.to;
    }
    return group;
}

INLINE void load_queries(const Attention& job, const Group& group, size_t width) {
    for (size_t t = 0; t < width; ++t) {
        const size_t query = job.first + group.first + (t < group.count ? t : 0);
        const size_t node = query / job.group;
        const float* of_node = job.shared_nodes ? job.shared_nodes[node].queries
                                          : job.queries + node * job.query_stride;
        const float* from = of_node + (job.first_head + query % job.group) * job.head_dim;
        for (size_t d = 0; d < job.head_dim; ++d)
            group.queries[d * width + t] = t < group.count ? from[d] : 0.0f;
    }
}

// What span `span` gives to a query of the job.
INLINE float* state_at(const Attention& job, size_t query, size_t span) {
    const size_t state = state_floats(job.head_dim);
    if (!job.shared_nodes) return job.states + (query * job.spans + span) * state;
    const SharedNode& shared_node = job.shared_nodes[query / job.group];
    return shared_node.states + (query % job.group * shared_node.spans + span) * state;
}

// The columns of one span.
template <class Number>
static void see_span(const Attention& job, const Tiling& tiles, const AttentionScratch& parts,
                     size_t span) {
    const size_t end = (span + 1) * kSpan;
    for (size_t begin = span * kSpan; begin < end; begin += kCacheBlock)
        for (size_t tile = 0; tile < tiles.count; ++tile) {
            const Group group = group_of(job, parts, tiles, tile);
            if (begin >= group.to) continue;
            if (begin + kCacheBlock <= group.from && begin >= parts.sinks) continue;
            const bool plain = job.chain || begin + kCacheBlock <= job.length;
            with_width(tiles.width_of(tile), [&](auto width) {
                constexpr int T = decltype(width)::value;
                plain ? see_block<Number, T>(job, group, parts, begin)
                      : see_tree<Number, T>(job, group, parts, begin);
            });
        }
}

template <class Number>
static void attend(const Attention& job, size_t first_span, size_t last_span, void* scratch) {
    const Tiling tiles = tiling(job.count, kWidest);
    const size_t dim = job.head_dim, state = state_floats(dim);
    AttentionScratch parts;
    divide(job, job.count, static_cast<float*>(scratch), &parts);
    parts.sinks = sink_columns(job);
    for (size_t tile = 0; tile < tiles.count; ++tile)
        load_queries(job, group_of(job, parts, tiles, tile), tiles.width_of(tile));
    for (size_t query = 0; query < job.count; ++query) {
        const size_t node = (job.first + query) / job.group;
        const size_t depth = job.shared_nodes ? job.shared_nodes[node].column
                                              : static_cast<size_t>(job.depths[node]);
        parts.start[query] = static_cast<int32_t>(window_start(job, depth));
        parts.last[query] = static_cast<int32_t>(job.length + depth);
        clear(parts.totals + query * state, dim);
    }
    for (size_t span = first_span; span < last_span; ++span) {
        for (size_t query = 0; query < job.count; ++query) parts.high[query] = kNothing;
        std::memset(parts.lanes, 0, kPanel * job.count * sizeof(float));
        std::memset(parts.sums, 0, padded(dim) * room(tiles) * sizeof(float));
        see_span<Number>(job, tiles, parts, span);
        for (size_t tile = 0; tile < tiles.count; ++tile) {
            const size_t width = tiles.width_of(tile), first = tile * tiles.width;
            for (size_t t = 0; t < tiles.tokens(tile); ++t) {
                float* total = parts.totals + (first + t) * state;
                if (job.states) {
                    total = state_at(job, job.first + first + t, span);
                    clear(total, dim);
                }
                merge(total, parts.high[first + t], parts.lanes + (first + t) * kPanel,
                      parts.sums + first * padded(dim) + t * kPanel, width * kPanel, dim);
            }
        }
    }
    if (job.states) return;
    for (size_t query = 0; query < job.count; ++query)
        finish(job, job.first + query, parts.totals + query * state);
}

// Merges the spans of query `query`, which other calls have left in `states`.
static void combine(const Attention& job, size_t query) {
    alignas(64) float total[2 * kPanel + kLargestHead];
    clear(total, job.head_dim);
    for (size_t span = 0; span < job.spans; ++span) {
        const float* part = state_at(job, query, span);
        merge(total, part[0], part + kPanel, part + 2 * kPanel, kPanel, job.head_dim);
    }
    finish(job, query, total);
}

static size_t mass_bytes(const Attention& job) {
    const size_t columns = job.length + job.nodes;
    const size_t blocks = (columns + kCacheBlock - 1) / kCacheBlock + 1;
    return (padded(job.head_dim) + blocks * kCacheBlock) * sizeof(float);
}

// One query after the other, each over aligned blocks of its own columns: what a node adds does not
// depend on the others.
template <class Number>
static void add_mass(const Attention& job, double* mass, void* scratch) {
    float* const query = static_cast<float*>(scratch);
    float* const scores = query + padded(job.head_dim);
    const size_t sinks = sink_columns(job);
    for (size_t q = job.first; q < job.first + job.count; ++q) {
        const size_t node = q / job.group, depth = static_cast<size_t>(job.depths[node]);
        const float* from = job.queries + node * job.query_stride +
                            (job.first_head + q % job.group) * job.head_dim;
        std::memcpy(query, from, job.head_dim * sizeof(float));
        const size_t start = window_start(job, depth), last = job.length + depth;
        const size_t first = sinks ? 0 : start / kCacheBlock * kCacheBlock;
        F16 most = splat(kNothing);
        for (size_t begin = first; begin <= last; begin += kCacheBlock) {
            const size_t left = last + 1 - begin, count = left < kCacheBlock ? left : kCacheBlock;
            float* const at = scores + (begin - first);
            multiply_keys<Number, 1>(job, begin, count, query, at);
            for (size_t p = 0; p < padded(count) / kPanel; ++p) {
                const F16 found = score<Number, 1>(job, block_at(job, begin), at, p, 0);
                const F16 shown = hide(found, begin + p * kPanel, start, last, sinks);
                store(at + p * kPanel, shown);
                most = max(most, shown);
            }
        }
        const F16 high = splat(largest(most));
        F16 total = splat(0.0f);
        const size_t end = padded(last + 1 - first);
        for (size_t column = 0; column < end; column += kPanel) {
            const F16 weight = exp(load(scores + column) - high);
            store(scores + column, weight);
            total = total + weight;
        }
        const float scale = 1.0f / sum(total);
        for (size_t column = sinks ? 0 : start; column <= last; ++column)
            mass[column] += static_cast<double>(scores[column - first] * scale);
    }
}

template <class Number>
static void score_run(const Attention& job, size_t row, const float* query, float* scores) {
    using W = FloatWeights<Number>;
    const uint8_t* const block = block_at(job, row);
    const size_t bytes = job.head_dim * W::kStep, place = row % kCacheBlock;
    const uint8_t* const keys = block + place / kPanel * bytes;
    multiply_panels<W, 1>(keys, bytes, 1, query, job.head_dim, {scores, kPanel, false},
                          {keys, W::kStep});
    F16 found = load(scores);
    if constexpr (Block<Number>::kScaled)
        found = found * load(Block<Number>::key_scales(block, job.head_dim) + place);
    store(scores, job.softcap == 0.0f ? found : softcap(found, job.softcap));
}

template <class Number>
constexpr CacheKernels cache_kernels = {
    Block<Number>::bytes, Block<Number>::put, Block<Number>::copy,
    attend<Number>,       add_mass<Number>,   score_run<Number>};
static const CacheKernels fp32_cache = cache_kernels<Fp32>;
static const CacheKernels fp16_cache = cache_kernels<Fp16>;
static const CacheKernels int8_cache = cache_kernels<Bytes>;

}  // namespace

}  // namespace paceline

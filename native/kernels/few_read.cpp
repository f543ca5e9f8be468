// Attention that reads few of the cached positions; compiled once for each instruction set.
//
// It takes what it reads in the order, blocks and spans of `attend`, and leaves out only what
// would weigh nothing there, so that with everything chosen both give the same bits.
#include "kernels/few_read.hpp"

#pragma GCC diagnostic ignored "-Wunused-function"  // functions and tables that kernels.cpp uses
#include "kernels/attention.hpp"

namespace paceline {

namespace {

// Pages whose summaries, and panels whose values, are fetched ahead. They lie far apart, so that
// the machine foresees none of them.
constexpr size_t kPagesAhead = 8, kPanelsAhead = 3;

INLINE size_t summary_floats(size_t head_dim) { return padded(head_dim) * kPanels; }

static size_t summary_bytes(size_t head_dim, Summary summary) {
    if (summary == Summary::none) return 0;
    return summary_floats(head_dim) * sizeof(float) * (summary == Summary::bounds ? 2 : 1);
}

// Summaries are [D / 4][4 dimensions][4 panels], first means or minima, then maxima.
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
        if (summary == Summary::mean) {
            low[at] = sum(key) * (1.0f / kPanel);
        } else {
            low[at] = -largest(splat(0.0f) - key);
            high[at] = largest(key);
        }
    }
    for (size_t d = head_dim; d < padded(head_dim); ++d) {
        low[d * kPanels + panel] = 0.0f;
        if (summary == Summary::bounds) high[d * kPanels + panel] = 0.0f;
    }
}

// Where a node stands, in columns and panels.
struct Place {
    size_t column;       // its own
    size_t ordered;      // rows below it are columns
    size_t whole;        // panels of such rows alone
    size_t start;        // first column that it sees
    size_t first, last;  // panels that it sees
    size_t old_first, old_last;  // those that are read only if they are chosen: first .. last - 1
    size_t chosen;               // how many of these are read
    size_t tail_rows;            // rows from panel `whole` on, up to the node's own
    size_t columns() const { return last + 1 - first; }
};

INLINE Place place_of(const FewReadNode& read) {
    const Attention& job = read.job;
    const FewRead& rule = read.rule;
    Place at;
    at.column = job.length + static_cast<size_t>(job.depths[read.node]);
    at.ordered = job.length + (job.chain ? read.node : 0);
    at.whole = at.ordered / kPanel;
    at.start = window_start(job, static_cast<size_t>(job.depths[read.node]));
    at.first = at.start / kPanel;
    at.last = at.column / kPanel;
    at.tail_rows = job.length + read.node + 1 - at.whole * kPanel;
    size_t near = at.last + 1 > rule.local ? at.last + 1 - rule.local : 0;
    near = near < at.whole ? near : at.whole;
    at.old_first = rule.sinks > at.first ? rule.sinks : at.first;
    at.old_last = near;
    at.chosen = 0;
    if (at.old_first >= at.old_last) {
        at.old_first = at.old_last = 0;
        return at;
    }
    const size_t old = at.old_last - at.old_first;
    if (read.read == HeadRead::near) return at;
    if (read.read == HeadRead::all) {
        at.chosen = old;
        return at;
    }
    const size_t total = rule.total(at.columns()), always = at.columns() - old;
    const size_t left = total > always ? total - always : 0;
    at.chosen = left < old ? left : old;
    return at;
}

struct FewReadScratch {
    float* queries;    // [tile][D][T]
    float* wide;       // [query][D / 4][4][4], twice for bounds: each dimension four times
    float* promised;   // [query][old panels]
    float* worth;      // [old panels]
    float* sorted;     // [old positions], for top_k
    int32_t* panels;   // those that are read, in order; then those of the tail's rows
    float* scores;     // [panel][T][16], of one tile
    float* tail;       // [column panel][T][16]: scores of the tail by column
    int32_t* rows;     // [column of the tail]: its row in the tail, or -1
    float* weights;    // [64 or rows of the tail][T]
    float* sums;       // [D / 16][T][16]
    float* totals;     // [T][state]
    float* high;       // [T]
    float* lanes;      // [T][16]
};

INLINE size_t divide(const FewReadNode& read, float* at, FewReadScratch* parts) {
    const Attention& job = read.job;
    const Place place = place_of(read);
    const Tiling tiles = tiling(job.group, kWidest);
    const size_t dim = job.head_dim, width = tiles.width_of(0);
    const size_t panels = (job.length + job.nodes) / kPanel + 2;
    const size_t tail = padded(place.tail_rows) + 2 * kCacheBlock;
    float* const begin = at;
    const auto take = [&](size_t floats) {
        float* start = at;
        at += padded(floats);
        return start;
    };
    parts->queries = take(room(tiles) * dim);
    parts->wide = take(job.group * 2 * summary_floats(dim));
    parts->promised = take(job.group * padded(panels + 2 * kPanel));
    parts->worth = take(panels + kPanel);
    parts->sorted = take(read.rule.top_k ? panels * kPanel : 0);
    parts->panels = (int32_t*)take(panels + tail / kPanel);
    parts->scores = take((panels + tail / kPanel) * width * kPanel);
    parts->tail = take((tail / kPanel + 1) * width * kPanel);
    parts->rows = (int32_t*)take(tail);
    parts->weights = take((tail > kCacheBlock ? tail : kCacheBlock) * width);
    parts->sums = take(padded(dim) * width);
    parts->totals = take(state_floats(dim) * width);
    parts->high = take(width);
    parts->lanes = take(kPanel * width);
    return static_cast<size_t>(at - begin);
}

static size_t few_read_bytes(const FewReadNode& read) {
    FewReadScratch parts;
    return divide(read, nullptr, &parts) * sizeof(float);
}

INLINE const float* query_at(const FewReadNode& read, size_t query) {
    const Attention& job = read.job;
    return job.queries + read.node * job.query_stride + (job.first_head + query) * job.head_dim;
}

// Lays a query out for summaries: by dimension four times; for bounds what multiplies the maxima
// and the minima.
static void widen_query(const FewReadNode& read, size_t query, float* wide) {
    const float* from = query_at(read, query);
    const size_t dim = read.job.head_dim, size = summary_floats(dim);
    const bool bounds = read.rule.summary == Summary::bounds;
    for (size_t d = 0; d < padded(dim); ++d) {
        const float value = d < dim ? from[d] : 0.0f;
        const float low = bounds && value > 0.0f ? 0.0f : value;
        for (size_t panel = 0; panel < kPanels; ++panel) {
            wide[d * kPanels + panel] = low;
            if (bounds) wide[size + d * kPanels + panel] = value > 0.0f ? value : 0.0f;
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

// Scores of old panels, in whole pages from that of `old_first` on: [query][panel].
static void promise_all(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                        size_t stride) {
    const Attention& job = read.job;
    const size_t floats = summary_bytes(job.head_dim, read.rule.summary) / sizeof(float);
    const size_t wide = 2 * summary_floats(job.head_dim);
    const size_t begin = place.old_first / kPanels, end = (place.old_last + kPanels - 1) / kPanels;
    for (size_t page = begin; page < end; ++page) {
        const size_t next = page + kPagesAhead < end ? page + kPagesAhead : end - 1;
        const auto* summaries = (const float*)(job.pages[page] + read.summaries);
        const auto* ahead = (const float*)(job.pages[next] + read.summaries);
        float* out = parts.promised + (page - begin) * kPanels;
        size_t query = 0;
        for (; query + 3 <= job.group; query += 3)
            promise<3>(summaries, parts.wide + query * wide, wide, floats, ahead,
                       out + query * stride, stride);
        for (; query < job.group; ++query)
            promise<1>(summaries, parts.wide + query * wide, wide, floats, ahead,
                       out + query * stride, stride);
    }
}

// The shares of each query's weight that panels would have, summed over queries.
static void weigh_panels(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                         size_t stride) {
    const size_t count = place.old_last - place.old_first, skipped = place.old_first % kPanels;
    for (size_t i = 0; i < count; i += kPanel) store(parts.worth + i, splat(0.0f));
    for (size_t query = 0; query < read.job.group; ++query) {
        float* scores = parts.promised + query * stride + skipped;
        for (size_t i = count; i < padded(count); ++i) scores[i] = -__builtin_inff();
        F16 most = splat(kNothing);
        for (size_t i = 0; i < count; i += kPanel) most = max(most, load(scores + i));
        const F16 high = splat(largest(most));
        F16 total = splat(0.0f);
        for (size_t i = 0; i < count; i += kPanel) {
            const F16 weight = exp(load(scores + i) - high);
            store(scores + i, weight);
            total = total + weight;
        }
        const F16 scale = splat(1.0f / sum(total));
        for (size_t i = 0; i < count; i += kPanel)
            store(parts.worth + i, fma(load(scores + i), scale, load(parts.worth + i)));
    }
}

INLINE int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

INLINE size_t count_from(const float* values, size_t count, int32_t low) {
    int32_t found = 0;
    for (size_t i = 0; i < count; ++i) found += bits_of(values[i]) >= low;
    return static_cast<size_t>(found);
}

// The largest bits that `wanted` of some values, none negative, reach.
static int32_t threshold(const float* values, size_t count, size_t wanted) {
    int32_t low = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const int32_t next = low | int32_t{1} << bit;
        if (count_from(values, count, next) >= wanted) low = next;
    }
    return low;
}

// Lists old panels of the most worth, of equals the earlier; returns the end of the list.
static int32_t* list_best(const Place& place, const float* worth, int32_t* to) {
    const size_t count = place.old_last - place.old_first;
    if (!place.chosen) return to;
    const int32_t low = threshold(worth, count, place.chosen);
    size_t equals = place.chosen - count_from(worth, count, low + 1);
    for (size_t i = 0; i < count; ++i) {
        const int32_t bits = bits_of(worth[i]);
        const bool equal = bits == low && equals > 0;
        equals -= equal;
        if (bits > low || equal) *to++ = static_cast<int32_t>(place.old_first + i);
    }
    return to;
}

// Lists the whole panels that are read, in order.
static int32_t* list_panels(const FewReadNode& read, const Place& place,
                            const FewReadScratch& parts) {
    const bool everything = read.rule.top_k && read.read == HeadRead::chosen;
    const size_t old = place.old_last - place.old_first;
    int32_t* to = parts.panels;
    size_t panel = place.first;
    const auto list = [&](size_t end) {
        for (; panel < end; ++panel) *to++ = static_cast<int32_t>(panel);
    };
    if (!old || everything || place.chosen == old) {
        list(place.whole);
        return to;
    }
    list(place.old_first);
    if (place.chosen) {
        const size_t stride = padded(old + 2 * kPanels + kPanel);
        for (size_t query = 0; query < read.job.group; ++query)
            widen_query(read, query, parts.wide + query * 2 * summary_floats(read.job.head_dim));
        promise_all(read, place, parts, stride);
        weigh_panels(read, place, parts, stride);
        to = list_best(place, parts.worth, to);
    }
    panel = place.old_last;
    list(place.whole);
    return to;
}

INLINE const uint8_t* panel_at(const Attention& job, size_t panel) {
    return job.pages[panel / kPanels] + job.offset;
}

// Scores of P panels, wherever they lie, times a tile of T queries: [P][T][16].
template <class Number, int P, int T>
INLINE void score_panels(const uint8_t* const* panels, size_t dim, const float* queries,
                         const uint8_t* const* ahead, float* scores) {
    constexpr size_t kStep = Block<Number>::kStep;
    Reg sum[P][T][kParts];
    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA { sum[p][t][i] = Reg{}; });
    for (size_t d = 0; d < dim; ++d) {
        Reg key[P][kParts];
#pragma GCC unroll 32
        for (int p = 0; p < P; ++p) {
            __builtin_prefetch(ahead[p] + d * kStep);
#pragma GCC unroll 32
            for (int i = 0; i < kParts; ++i) key[p][i] = Number::read(panels[p] + d * kStep, i, 0);
        }
#pragma GCC unroll 32
        for (int t = 0; t < T; ++t) {
            const Reg value = queries[d * T + t] - Reg{};
#pragma GCC unroll 32
            for (int p = 0; p < P; ++p)
#pragma GCC unroll 32
                for (int i = 0; i < kParts; ++i)
                    sum[p][t][i] = reg_fma(key[p][i], value, sum[p][t][i]);
        }
    }
    each<P, T>([&](int p, int t, int i) INLINE_LAMBDA {
        store_part(scores + (p * T + t) * kPanel, i, sum[p][t][i]);
    });
}

// Scores of listed panels of rows, scaled and capped: [panel][T][16].
template <class Number, int T>
static void score_list(const Attention& job, const int32_t* panels, size_t count,
                       const float* queries, float* scores) {
    constexpr size_t P = FloatWeights<Number>::panels(T);
    const size_t bytes = job.head_dim * Block<Number>::kStep;
    const auto keys = [&](size_t i) {
        const auto panel = static_cast<size_t>(panels[i < count ? i : count - 1]);
        return panel_at(job, panel) + panel % kPanels * bytes;
    };
    size_t done = 0;
    const uint8_t *now[P], *next[P];
    for (; done + P <= count; done += P) {
        for (size_t p = 0; p < P; ++p) {
            now[p] = keys(done + p);
            next[p] = keys(done + P + p);
        }
        score_panels<Number, P, T>(now, job.head_dim, queries, next, scores + done * T * kPanel);
    }
    for (; done < count; ++done) {
        now[0] = keys(done);
        score_panels<Number, 1, T>(now, job.head_dim, queries, now, scores + done * T * kPanel);
    }
    if (!Block<Number>::kScaled && job.softcap == 0.0f) return;
    for (size_t i = 0; i < count; ++i) {
        const auto panel = static_cast<size_t>(panels[i]);
        for (size_t t = 0; t < T; ++t) {
            float* at = scores + (i * T + t) * kPanel;
            F16 found = load(at);
            if constexpr (Block<Number>::kScaled)
                found = found * load(Block<Number>::key_scales(panel_at(job, panel), job.head_dim) +
                                     panel % kPanels * kPanel);
            store(at, job.softcap == 0.0f ? found : softcap(found, job.softcap));
        }
    }
}

// The row behind panel `whole` of each column from there on that the node sees.
static void find_rows(const FewReadNode& read, const Place& place, int32_t* rows) {
    const Attention& job = read.job;
    const size_t base = place.whole * kPanel, count = place.column + 1 - base;
    for (size_t i = 0; i < padded(count); ++i) rows[i] = -1;
    for (size_t row = base; row < place.ordered; ++row)
        rows[row - base] = static_cast<int32_t>(row - base);
    for (int32_t i = static_cast<int32_t>(read.node); i >= 0; i = job.parents[i]) {
        const size_t column = job.length + static_cast<size_t>(job.depths[i]);
        if (column < place.ordered) break;
        rows[column - base] = static_cast<int32_t>(job.length + static_cast<size_t>(i) - base);
    }
}

// Moves scores of the tail's rows to its columns; what a node does not see is hidden.
template <int T>
static void order_tail(const Place& place, const int32_t* rows, const float* scores, float* tail) {
    const size_t columns = padded(place.column + 1 - place.whole * kPanel);
    for (size_t t = 0; t < T; ++t)
        for (size_t c = 0; c < columns; ++c) {
            const size_t to = (c / kPanel * T + t) * kPanel + c % kPanel;
            const auto row = static_cast<size_t>(rows[c]);
            const bool hidden = rows[c] < 0 || place.whole * kPanel + c < place.start;
            tail[to] = hidden ? -__builtin_inff()
                              : scores[(row / kPanel * T + t) * kPanel + row % kPanel];
        }
}

// A score as a number that is not negative, in the order of scores but for the last bit.
INLINE int32_t sortable(float score) {
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    return static_cast<int32_t>((bits >> 31 ? ~bits : bits | 0x80000000u) >> 1);
}

// Hides of old positions all but the best of each query; of equals the earlier stay.
template <int T>
static void keep_top(const Place& place, const int32_t* panels, size_t listed, size_t queries,
                     float* scores, float* sorted) {
    size_t first = 0, last = 0;
    for (size_t i = 0; i < listed; ++i) {
        const auto panel = static_cast<size_t>(panels[i]);
        first += panel < place.old_first;
        last += panel < place.old_last;
    }
    const size_t count = (last - first) * kPanel, wanted = place.chosen * kPanel;
    for (size_t t = 0; t < queries; ++t) {
        const auto at = [&](size_t i) {
            return scores + ((first + i / kPanel) * T + t) * kPanel + i % kPanel;
        };
        for (size_t i = 0; i < count; ++i) {
            const int32_t key = sortable(*at(i));
            std::memcpy(sorted + i, &key, sizeof(key));
        }
        const int32_t low = wanted ? threshold(sorted, count, wanted) : INT32_MAX;
        size_t equals = wanted ? wanted - count_from(sorted, count, low + 1) : 0;
        for (size_t i = 0; i < count; ++i) {
            const bool equal = bits_of(sorted[i]) == low && equals > 0;
            equals -= equal;
            if (bits_of(sorted[i]) <= low && !equal) *at(i) = -__builtin_inff();
        }
    }
}

// As `absorb` of a block that has one panel only.
INLINE float absorb_panel(F16* scores, float* high, float* lanes) {
    const float top = largest(*scores);
    const float next = top > *high ? top : *high;
    float scale = 1.0f;
    if (next > *high) {
        float first[kPanel];
        store(first, exp(splat(*high - next)));
        scale = first[0];
    }
    *scores = exp(*scores - splat(next));
    store(lanes, fma(load(lanes), splat(scale), *scores));
    *high = next;
    return scale;
}

// What is known of a tile of T queries while blocks are added.
template <class Number, int T>
struct Reader {
    const FewReadNode& read;
    const Place& place;
    const FewReadScratch& parts;
    size_t queries;  // of the tile
    size_t listed;   // whole panels that are read

    const Attention& job() const { return read.job; }

    void start_span() const {
        for (size_t t = 0; t < queries; ++t) parts.high[t] = kNothing;
        std::memset(parts.lanes, 0, kPanel * T * sizeof(float));
        std::memset(parts.sums, 0, padded(job().head_dim) * T * sizeof(float));
    }

    void end_span() const {
        for (size_t t = 0; t < queries; ++t)
            merge(parts.totals + t * state_floats(job().head_dim), parts.high[t],
                  parts.lanes + t * kPanel, parts.sums + t * kPanel, T * kPanel, job().head_dim);
    }

    // Adds `count` rows of a block, from `row` on; what follows is fetched from panel `next`.
    void add_values(size_t row, size_t count, const float* weights, size_t next) const {
        using W = FloatWeights<Number>;
        const size_t values = Block<Number>::values_at(job().head_dim);
        const auto at = [&](size_t from) {
            return job().pages[from / kCacheBlock] + job().offset + values +
                   from % kCacheBlock * W::kStep;
        };
        multiply_panels<W, T>(at(row), kCacheBlock * W::kStep, padded(job().head_dim) / kPanel,
                              weights, count, {parts.sums, T * kPanel, true},
                              {at(next * kPanel), W::kStep});
    }

    // Columns of one block: its listed panels from `begin` to `end`, and those of the tail.
    void add_block(size_t block, size_t begin, size_t end) const {
        const float* tail = parts.tail;
        const size_t from = block * kPanels > place.whole ? block * kPanels : place.whole;
        const size_t to = (block + 1) * kPanels < place.last + 1 ? (block + 1) * kPanels
                                                                   : place.last + 1;
        if (from < to) std::memset(parts.weights, 0, padded(place.tail_rows) * T * sizeof(float));
        float* const listed_weights = parts.scores + begin * T * kPanel;
        for (size_t t = 0; t < queries; ++t) {
            F16 scores[kPanels];
            for (F16& some : scores) some = splat(-__builtin_inff());
            for (size_t i = begin; i < end; ++i)
                scores[static_cast<size_t>(parts.panels[i]) % kPanels] =
                    load(parts.scores + (i * T + t) * kPanel);
            for (size_t panel = from; panel < to; ++panel)
                scores[panel % kPanels] = load(tail + ((panel - place.whole) * T + t) * kPanel);
            float* const lanes = parts.lanes + t * kPanel;
            const float scale =
                from >= to && end - begin == 1
                    ? absorb_panel(&scores[static_cast<size_t>(parts.panels[begin]) % kPanels],
                                   parts.high + t, lanes)
                    : absorb(scores, parts.high + t, lanes);
            rescale<T>(parts.sums, t, job().head_dim, scale);
            for (size_t i = begin; i < end; ++i) {
                const auto panel = static_cast<size_t>(parts.panels[i]);
                F16 weight = scores[panel % kPanels];
                if constexpr (Block<Number>::kScaled)
                    weight = weight * load(value_scales(panel * kPanel));
                store(parts.scores + (i * T + t) * kPanel, weight);
            }
            for (size_t panel = from; panel < to; ++panel)
                spread_tail(panel, t, scores[panel % kPanels]);
        }
        for (size_t i = begin; i < end; ++i) {
            float weights[kPanel * T];
            const float* lanes = listed_weights + (i - begin) * T * kPanel;
            for (size_t t = 0; t < T; ++t)
                for (size_t c = 0; c < kPanel; ++c)
                    weights[c * T + t] = t < queries ? lanes[t * kPanel + c] : 0.0f;
            const auto panel = static_cast<size_t>(parts.panels[i]);
            const size_t ahead = i + kPanelsAhead < listed ? i + kPanelsAhead : i;
            const auto next = static_cast<size_t>(parts.panels[ahead]);
            add_values(panel * kPanel, kPanel, weights, next);
        }
        if (from < to) add_tail();
    }

    const float* value_scales(size_t row) const {
        return Block<Number>::value_scales(job().pages[row / kCacheBlock] + job().offset,
                                           job().head_dim) +
               row % kCacheBlock;
    }

    // Gives weights of a panel of columns to the rows of the tail.
    void spread_tail(size_t panel, size_t t, F16 scores) const {
        float lane[kPanel];
        store(lane, scores);
        const size_t base = place.whole * kPanel;
        for (size_t i = 0; i < kPanel; ++i) {
            const int32_t row = parts.rows[panel * kPanel + i - base];
            if (row < 0) continue;
            float weight = lane[i];
            if constexpr (Block<Number>::kScaled)
                weight *= *value_scales(base + static_cast<size_t>(row));
            parts.weights[static_cast<size_t>(row) * T + t] = weight;
        }
    }

    void add_tail() const {
        for (size_t row = 0; row < place.tail_rows; row += kPanel) {
            const size_t left = place.tail_rows - row, count = left < kPanel ? left : kPanel;
            const float* weights = parts.weights + row * T;
            bool some = false;
            for (size_t i = 0; i < count * T; ++i) some = some || weights[i] != 0.0f;
            const size_t panel = place.whole + row / kPanel;
            if (some) add_values(panel * kPanel, count, weights, panel);
        }
    }

    void run() const {
        size_t i = 0, span = SIZE_MAX;
        const size_t none = place.last / kPanels + 1;
        size_t tail = place.whole / kPanels;
        while (true) {
            const size_t of_list =
                i < listed ? static_cast<size_t>(parts.panels[i]) / kPanels : none;
            const size_t of_tail = tail <= place.last / kPanels ? tail : none;
            const size_t block = of_list < of_tail ? of_list : of_tail;
            if (block == none) break;
            size_t end = i;
            while (end < listed && static_cast<size_t>(parts.panels[end]) / kPanels == block) ++end;
            const size_t own = block * kCacheBlock / kSpan;
            if (own != span) {
                if (span != SIZE_MAX) end_span();
                start_span();
                span = own;
            }
            add_block(block, i, end);
            i = end;
            tail += block == of_tail;
        }
        if (span != SIZE_MAX) end_span();
    }
};

template <class Number, int T>
static void read_tile(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                      size_t first, size_t queries, size_t listed) {
    const Attention& job = read.job;
    for (size_t t = 0; t < T; ++t)
        for (size_t d = 0; d < job.head_dim; ++d)
            parts.queries[d * T + t] = t < queries ? query_at(read, first + t)[d] : 0.0f;
    for (size_t t = 0; t < queries; ++t) clear(parts.totals + t * state_floats(job.head_dim),
                                               job.head_dim);
    const size_t tail = padded(place.tail_rows) / kPanel;
    score_list<Number, T>(job, parts.panels, listed + tail, parts.queries, parts.scores);
    for (size_t i = 0; i < listed; ++i) {
        const size_t column = static_cast<size_t>(parts.panels[i]) * kPanel;
        if (column >= place.start) break;
        for (size_t t = 0; t < queries; ++t) {
            float* at = parts.scores + (i * T + t) * kPanel;
            store(at, hide(load(at), column, place.start, place.column));
        }
    }
    if (read.rule.top_k && read.read == HeadRead::chosen)
        keep_top<T>(place, parts.panels, listed, queries, parts.scores, parts.sorted);
    order_tail<T>(place, parts.rows, parts.scores + listed * T * kPanel, parts.tail);
    Reader<Number, T>{read, place, parts, queries, listed}.run();
    for (size_t t = 0; t < queries; ++t)
        finish(job, read.node * job.group + first + t,
               parts.totals + t * state_floats(job.head_dim));
}

template <class Number>
static void attend_few(const FewReadNode& read, void* scratch) {
    const Place place = place_of(read);
    FewReadScratch parts;
    divide(read, static_cast<float*>(scratch), &parts);
    int32_t* const end = list_panels(read, place, parts);
    const auto listed = static_cast<size_t>(end - parts.panels);
    for (size_t i = 0; i < padded(place.tail_rows) / kPanel; ++i)
        end[i] = static_cast<int32_t>(place.whole + i);
    find_rows(read, place, parts.rows);
    const Tiling tiles = tiling(read.job.group, kWidest);
    for (size_t tile = 0; tile < tiles.count; ++tile)
        with_width(tiles.width_of(tile), [&](auto width) {
            read_tile<Number, decltype(width)::value>(read, place, parts, tile * tiles.width,
                                                      tiles.tokens(tile), listed);
        });
}

template <class Number>
constexpr FewReadKernels few_read = {summary_bytes, summarise<Number>, few_read_bytes,
                                     attend_few<Number>};

}  // namespace

namespace PACELINE_ISA {
// By CacheFormat; isa.cpp finds it.
extern const FewReadKernels few_read_kernels[kFewReadFormats];
const FewReadKernels few_read_kernels[kFewReadFormats] = {few_read<Fp32>, few_read<Fp16>, few_read<Bytes>};
}  // namespace PACELINE_ISA

}  // namespace paceline

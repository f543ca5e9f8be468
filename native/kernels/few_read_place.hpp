// Where a node stands that reads few of the cached positions, and the scratch memory of its kernels.
#pragma once

#include "kernels/attention.hpp"
#include "kernels/few_read.hpp"

namespace paceline {

namespace {

// Floats of one vector for each panel of a page, padded.
INLINE size_t summary_floats(size_t head_dim) { return padded(head_dim) * kPanels; }

// Where a node stands, in columns and panels.
struct Place {
    size_t column;       // its own
    size_t ordered;      // rows below it are columns
    size_t whole;        // panels of such rows alone
    size_t start;        // first column that it sees
    size_t first, last;  // panels that it sees
    size_t old_first, old_last;  // those that are read only if they are chosen: first .. last - 1
    size_t chosen;               // how many of these are read
    size_t picked;               // single positions that are read of them instead
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
    if (read.clusters && near * kPanel > read.clusters->fixed)
        at.old_last = read.clusters->fixed / kPanel;
    at.chosen = at.picked = 0;
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
    if (read.clusters) {
        const size_t seen = at.column + 1 - at.start, low = at.old_first * kPanel;
        const size_t some = at.old_last * kPanel - (low > at.start ? low : at.start);
        const size_t total = rule.total_positions(seen), always = seen - some;
        at.picked = total > always ? total - always : 0;
        if (at.picked < some) return at;
        at.picked = 0;
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
    float* promised;   // [query][vector][old panels]
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
    // Of a choice by clusters:
    int32_t *choosable, *members, *bits;  // [cluster]: its positions, those of the best, its score
    int32_t *top_members, *top_bits;      // [coarse cluster]
    uint8_t* some;                        // [panel of clusters]: whether any can be chosen
    uint16_t* masks;                      // [query][panel of rows]: which rows are read
    int32_t* picked;                      // panels in which some are
    float* picked_scores;                 // [panel][T][16], of one tile
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
    parts->promised = take(job.group * read.rule.vectors() * padded(panels + 2 * kPanel));
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
    if (const Clusters* own = read.clusters) {
        const size_t rows = own->fixed / kPanel;
        parts->choosable = (int32_t*)take(own->count);
        parts->members = (int32_t*)take(own->count);
        parts->bits = (int32_t*)take(own->count);
        parts->top_members = (int32_t*)take(own->tops);
        parts->top_bits = (int32_t*)take(own->tops);
        parts->some = (uint8_t*)take(own->count);
        parts->masks = (uint16_t*)take(job.group * rows);
        parts->picked = (int32_t*)take(rows);
        parts->picked_scores = take(rows * width * kPanel);
    }
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

INLINE const uint8_t* panel_at(const Attention& job, size_t panel) {
    return job.pages[panel / kPanels] + job.offset;
}

}  // namespace

}  // namespace paceline

// Adds the values of the panels that are read, in the order, blocks and spans of `attend`.
#pragma once

#include "kernels/few_read_place.hpp"

namespace paceline {

namespace {

constexpr size_t kPanelsAhead = 3;  // panels whose values are fetched ahead, as they lie far apart

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

}  // namespace

}  // namespace paceline

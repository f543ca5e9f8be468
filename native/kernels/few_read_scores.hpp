// Scores of the panels that are read, and of the rows of a tree behind them.
#pragma once

#include "kernels/few_read_place.hpp"

namespace paceline {

namespace {

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

}  // namespace

}  // namespace paceline

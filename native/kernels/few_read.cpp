// Attention that reads few of the cached positions; compiled once for each instruction set.
//
// It takes what it reads in the order, blocks and spans of `attend`, and leaves out only what
// would weigh nothing there, so that with everything chosen both give the same bits.
#pragma GCC diagnostic ignored "-Wunused-function"  // functions and tables that kernels.cpp uses
#include "kernels/few_read_choice.hpp"
#include "kernels/few_read_clusters.hpp"
#include "kernels/few_read_pick.hpp"
#include "kernels/few_read_scores.hpp"
#include "kernels/few_read_values.hpp"

namespace paceline {

namespace {

template <class Number, int T>
static void read_tile(const FewReadNode& read, const Place& place, const FewReadScratch& parts,
                      size_t first, size_t queries, size_t listed, size_t picked) {
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
    if (picked) read_picked<Number, T>(read, parts, first, queries, picked);
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
    const size_t picked = place.picked ? pick_rows(read, place, parts) : 0;
    const Tiling tiles = tiling(read.job.group, kWidest);
    for (size_t tile = 0; tile < tiles.count; ++tile)
        with_width(tiles.width_of(tile), [&](auto width) {
            read_tile<Number, decltype(width)::value>(read, place, parts, tile * tiles.width,
                                                      tiles.tokens(tile), listed, picked);
        });
}

template <class Number>
constexpr FewReadKernels few_read = {summary_bytes, summarise<Number>, represent<Number>, read_keys<Number>,
                                     cluster_bytes, cluster, few_read_bytes,
                                     attend_few<Number>};

}  // namespace

namespace PACELINE_ISA {
// By CacheFormat; isa.cpp finds it.
extern const FewReadKernels few_read_kernels[kFewReadFormats];
const FewReadKernels few_read_kernels[kFewReadFormats] = {few_read<Fp32>, few_read<Fp16>, few_read<Bytes>};
}  // namespace PACELINE_ISA

}  // namespace paceline

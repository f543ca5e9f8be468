// Attention that reads few of the cached positions: what is asked of its kernels.
//
// Positions are chosen in runs of 16, a panel of the cache each: for every node and kv head the
// first `sinks` panels, the last `local` ones up to the node's own, and between them those whose
// summaries promise most. A choice depends on the node's query and on the keys before it alone, so
// that trees, chunks and batches change nothing.
#pragma once

#include "kernels/kernels.hpp"

namespace paceline {

// What is kept of a panel's keys beside them: nothing, their mean, their bounds by dimension, or
// their mean and variance by dimension.
enum class Summary { none, mean, bounds, spread, count };

// What a kv head reads of a layer.
enum class HeadRead : uint8_t { all, chosen, near, count };

// How many panels are read, of those that a node sees.
struct FewRead {
    Summary summary = Summary::none;  // by which panels are chosen; none: none is, but by `top_k`
    bool top_k = false;  // score all keys; each query head reads the values of the best positions
    size_t sinks = 1, local = 4;  // panels that are always read; local at least 1
    size_t least = 0;             // panels, the sinks and local ones included
    double share = 1.0;           // of the panels that a node sees, likewise; the larger counts

    size_t total(size_t seen) const {
        const double part = share * static_cast<double>(seen);
        size_t count = static_cast<size_t>(part);
        if (static_cast<double>(count) < part) ++count;
        return count > least ? count : least;
    }
};

// All queries of one kv head at one node. Of the job, `first`, `count`, `spans`, `states` and
// `shared_nodes` are not used.
struct FewReadNode {
    Attention job;
    size_t node;
    size_t summaries;  // where a page holds those of the head
    FewRead rule;
    HeadRead read;
};

constexpr size_t kFewReadFormats = 3;  // fp32, fp16, int8

// For one format of the cache.
struct FewReadKernels {
    // Bytes of the summaries of one block of 64 positions of a head.
    size_t (*summary_bytes)(size_t head_dim, Summary);
    // Summarises panel `panel` of a block.
    void (*summarise)(const uint8_t* block, size_t panel, size_t head_dim, Summary,
                      uint8_t* summaries);
    size_t (*scratch_bytes)(const FewReadNode&);
    void (*attend)(const FewReadNode&, void* scratch);
};

// Those of an instruction set, for each of the first `kFewReadFormats` formats of the cache.
const FewReadKernels* find_few_read(const Kernels& kernels);

}  // namespace paceline

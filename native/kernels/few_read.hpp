// Attention that reads few of the cached positions: what is asked of its kernels.
//
// Positions are chosen in runs of 16, a panel of the cache each: for every node and kv head the
// first `sinks` panels, the last `local` ones up to the node's own, and between them those whose
// summaries promise most. A choice depends on the node's query and on the keys before it alone, so
// that trees, chunks and batches change nothing.
#pragma once

#include "kernels/clusters.hpp"
#include "kernels/kernels.hpp"

namespace paceline {

// What is kept of a panel's keys beside them: nothing, their mean, their bounds by dimension, their
// mean and variance by dimension, or some of them and the mean of the others. With `centroids` single
// positions of a prompt are chosen by clusters of its keys; see clusters.hpp.
enum class Summary { none, mean, bounds, spread, representatives, centroids, count };

// What a kv head reads of a layer.
enum class HeadRead : uint8_t { all, chosen, near, count };

// How many panels are read, of those that a node sees.
struct FewRead {
    Summary summary = Summary::none;  // by which panels are chosen; none: none is, but by `top_k`
    bool top_k = false;  // score all keys; each query head reads the values of the best positions
    size_t sinks = 1, local = 4;  // panels that are always read; local at least 1
    size_t least = 0;             // panels, the sinks and local ones included
    double share = 1.0;           // of the panels that a node sees, likewise; the larger counts
    size_t representatives = 0;   // keys of a panel that stand for themselves, up to 16
    size_t following = 0;         // panels behind a panel whose queries choose these; below `local`
    double clusters = 0.0;        // centroids for each position of a prompt
    size_t levels = 1;            // 2: clusters are chosen among those of the best coarse ones

    // Vectors of head_dim numbers that a summary has.
    size_t vectors() const {
        if (summary == Summary::representatives) return representatives + (representatives < 16);
        return summary == Summary::bounds || summary == Summary::spread ? 2 : 1;
    }
    size_t total(size_t seen) const { return shared(seen, least); }
    // Likewise where single positions are chosen.
    size_t total_positions(size_t seen) const { return shared(seen, least * kPanel); }
    size_t shared(size_t seen, size_t low) const {
        const double part = share * static_cast<double>(seen);
        size_t count = static_cast<size_t>(part);
        if (static_cast<double>(count) < part) ++count;
        return count > low ? count : low;
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
    const Clusters* clusters;  // of the prompt, where single positions are chosen; or null
};

constexpr size_t kFewReadFormats = 3;  // fp32, fp16, int8

// For one format of the cache.
struct FewReadKernels {
    // Bytes of the summaries of one block of 64 positions of a head.
    size_t (*summary_bytes)(size_t head_dim, const FewRead&);
    // Summarises panel `panel` of a block.
    void (*summarise)(const uint8_t* block, size_t panel, size_t head_dim, Summary,
                      uint8_t* summaries);
    // Writes those keys of panel `panel` of a block that have the largest products with `wanted`
    // [head_dim], and the mean of the others, to place `slot` of summaries.
    void (*represent)(const uint8_t* block, size_t panel, size_t head_dim, const FewRead&,
                      const float* wanted, size_t slot, uint8_t* summaries);
    // The keys of panel `panel` of a block, [head_dim][16].
    void (*read_keys)(const uint8_t* block, size_t panel, size_t head_dim, float* keys);
    // Labels each point with one of `count` clusters, and writes their means, [panel][D][16];
    // `scratch` holds `cluster_bytes(points, count)`.
    size_t (*cluster_bytes)(const Points&, size_t count);
    void (*cluster)(const Points&, size_t count, int32_t* labels, float* means, void* scratch);
    size_t (*scratch_bytes)(const FewReadNode&);
    void (*attend)(const FewReadNode&, void* scratch);
};

// Those of an instruction set, for each of the first `kFewReadFormats` formats of the cache.
const FewReadKernels* find_few_read(const Kernels& kernels);

}  // namespace paceline

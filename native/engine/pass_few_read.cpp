// The part of a pass that concerns attention to few of the cached positions.
//
// Nodes of a prompt read everything, as one call for many queries does; the others choose apart,
// a call for each node and kv head.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "engine/pass.hpp"

namespace paceline {

// Whether nodes of a branch may read less than everything in some layer. A view of positions says
// itself what is read.
bool Pass::reads_few(const Branch& branch) const {
    if (!model_.few_read_kernels || model_.head_reads.empty() || view_.positions) return false;
    return branch.cache->length() + branch.nodes > branch.cache->prompt();
}

bool Pass::reads_few(size_t layer, const Branch& branch) const {
    if (!reads_few(branch)) return false;
    const auto all = [](HeadRead read) { return read == HeadRead::all; };
    return !std::ranges::all_of(model_.head_reads[layer], all);
}

// Rows of a tree that branches are no panels, so they must lie in what a node always reads.
void Pass::check_reach(const Branch& branch, size_t deepest, bool chain) const {
    if (chain || !reads_few(branch)) return;
    const size_t length = branch.cache->length();
    if ((length + deepest) / kPanel + 1 > length / kPanel + model_.few_read.local)
        throw std::invalid_argument("a tree of depth " + std::to_string(deepest) +
                                    " leaves the last " +
                                    std::to_string(model_.few_read.local * kPanel) +
                                    " positions, which are always read; take a smaller budget");
}

size_t Pass::few_read_calls(size_t layer, size_t branch) const {
    return batch_[branch].nodes * shape_.layers[layer].kv_heads;
}

FewReadNode Pass::few_read_node(size_t layer, size_t branch, size_t head, size_t node) const {
    const KVCache& cache = *batch_[branch].cache;
    const size_t position = cache.length() + static_cast<size_t>(depths_[first_[branch] + node]);
    const bool prompt = position < cache.prompt();
    return {.job = attention(layer, branch, head),
            .node = node,
            .summaries = cache.summaries(layer, head),
            .rule = model_.few_read,
            .read = prompt ? HeadRead::all : model_.head_reads[layer][head]};
}

void Pass::read_few(size_t layer, size_t branch, size_t call, Buffer& scratch) const {
    const size_t heads = shape_.layers[layer].kv_heads;
    model_.few_read_kernels->attend(few_read_node(layer, branch, call % heads, call / heads),
                                    scratch.bytes());
}

// Whether a chain is long enough to choose from what it fills itself.
bool Pass::summarises(size_t layer) const {
    for (const Branch& branch : batch_)
        if (branch.nodes > 1 && reads_few(layer, branch)) return true;
    return false;
}

// Panels that a chain fills are chosen from by its own later nodes.
void Pass::summarise(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const size_t heads = shape_.layers[layer].kv_heads;
    const auto [begin, end] = chunk_range(batch_.size() * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t b = item / heads;
        const Branch& branch = batch_[b];
        if (!chain_[b] || !reads_few(layer, branch)) continue;
        const size_t length = branch.cache->length();
        branch.cache->summarise(layer, item % heads, length / kPanel,
                                (length + branch.nodes) / kPanel);
    }
}

}  // namespace paceline

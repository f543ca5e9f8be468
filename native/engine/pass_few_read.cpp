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
    if (!reads_few(branch) || shape_.layers[layer].sinks) return false;
    const auto all = [](HeadRead read) { return read == HeadRead::all; };
    return !std::ranges::all_of(model_.head_reads[layer], all);
}

// Rows of a tree that branches are no panels, so they must lie in what a node always reads.
void Pass::check_reach(const Branch& branch, size_t deepest, bool chain) const {
    if (chain || !reads_few(branch)) return;
    const size_t length = branch.cache->length();
    if (model_.few_read.summary == Summary::centroids) {
        if (branch.cache->clustered() > length)
            throw std::invalid_argument("a tree that branches must begin behind the prompt, whose " +
                                        std::to_string(branch.cache->clustered()) +
                                        " positions are clustered; found position " +
                                        std::to_string(length));
        return;
    }
    const size_t own = (length + deepest) / kPanel, local = model_.few_read.local;
    const size_t reach = local - model_.few_read.following;
    if (own + 1 > local && own + 1 > length / kPanel + reach)
        throw std::invalid_argument("a tree of depth " + std::to_string(deepest) +
                                    " leaves the last " + std::to_string(reach * kPanel) +
                                    " positions, which are always read; take a smaller budget");
}

size_t Pass::few_read_calls(size_t layer, size_t branch) const {
    return batch_[branch].nodes * shape_.layers[layer].kv_heads;
}

FewReadNode Pass::few_read_node(size_t layer, size_t branch, size_t head, size_t node) const {
    const KVCache& cache = *batch_[branch].cache;
    const size_t position = cache.length() + static_cast<size_t>(depths_[first_[branch] + node]);
    const bool centroids = model_.few_read.summary == Summary::centroids;
    const PromptClusters* const clusters = centroids ? cache.clusters() : nullptr;
    const bool all = position < cache.prompt() || (centroids && !clusters);
    const HeadRead read = all ? HeadRead::all : model_.head_reads[layer][head];
    return {.job = attention(layer, branch, head),
            .node = node,
            .summaries = cache.summaries(layer, head),
            .rule = model_.few_read,
            .read = read,
            .clusters = clusters && read == HeadRead::chosen ? &clusters->of(layer, head) : nullptr};
}

void Pass::read_few(size_t layer, size_t branch, size_t call, Buffer& scratch) const {
    const size_t heads = shape_.layers[layer].kv_heads;
    model_.few_read_kernels->attend(few_read_node(layer, branch, call % heads, call / heads),
                                    scratch.bytes());
}

// Sequences that share clusters let the first of them make them.
bool Pass::lacks_clusters(size_t layer, size_t b, size_t head) const {
    const PromptClusters* const own = batch_[b].cache->clusters();
    if (!own || !reads_few(batch_[b])) return false;
    for (size_t before = 0; before < b; ++before)
        if (batch_[before].cache->clusters() == own && reads_few(batch_[before])) return false;
    return model_.head_reads[layer][head] == HeadRead::chosen && !own->made(layer, head);
}

bool Pass::lacks_clusters(size_t layer) const {
    for (size_t b = 0; b < batch_.size(); ++b)
        for (size_t head = 0; head < shape_.layers[layer].kv_heads; ++head)
            if (lacks_clusters(layer, b, head)) return true;
    return false;
}

void Pass::make_clusters(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const size_t heads = shape_.layers[layer].kv_heads;
    const auto [begin, end] = chunk_range(batch_.size() * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item)
        if (lacks_clusters(layer, item / heads, item % heads))
            batch_[item / heads].cache->make_clusters(layer, item % heads);
}

// Sums the queries of the heads that share keys, where representatives are chosen by them.
void Pass::sum_queries(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const auto [begin, end] = chunk_range(n_ * shape.kv_heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / shape.kv_heads, head = item % shape.kv_heads;
        const size_t b = branch_of_[node];
        float* sum = batch_[b].cache->query_sum(layer, head, node - first_[b]);
        const float* from = row(work_.qkv, node, qkv_) + head * shape.group() * shape.head_dim;
        std::copy_n(from, shape.head_dim, sum);
        for (size_t query = 1; query < shape.group(); ++query)
            for (size_t d = 0; d < shape.head_dim; ++d) sum[d] += from[query * shape.head_dim + d];
    }
}

// Whether a chain is long enough to choose from what it fills itself.
bool Pass::summarises(size_t layer) const {
    if (model_.few_read.summary == Summary::centroids) return false;
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

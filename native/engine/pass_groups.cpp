// The part of a pass over a cache in groups that rounds the groups which its nodes fill.

#include <algorithm>
#include <cstring>

#include "engine/pass.hpp"

namespace paceline {

namespace {

size_t group_of(size_t position) { return position / kCacheGroup * kCacheGroup; }

bool fills(size_t position) { return position % kCacheGroup + 1 == kCacheGroup; }

}  // namespace

// A chain's groups go where they will lie. Nothing reads there before they are committed.
void Pass::find_closings() {
    if (!batch_[0].cache->grouped()) return;
    closed_.resize(batch_.size());
    for (size_t b = 0; b < batch_.size(); ++b) {
        const size_t length = batch_[b].cache->length(), end = length + batch_[b].nodes;
        if (!chain_[b]) {
            find_closings_of_tree(b);
            continue;
        }
        for (size_t at = group_of(length); at + kCacheGroup <= end; at += kCacheGroup)
            closings_.push_back({b, at, 0, {}});
    }
}

// A node that fills a group and has children makes a block: the group, and the one before it in
// the same 64 positions, copied where it is rounded already.
void Pass::find_closings_of_tree(size_t b) {
    const Branch& branch = batch_[b];
    const size_t length = branch.cache->length(), from = group_of(length);
    ClosedTree& tree = closed_[b];
    std::vector<int32_t> ends(branch.nodes, -1);  // blocks that nodes make
    std::vector<bool> parent(branch.nodes);
    for (size_t i = 1; i < branch.nodes; ++i) parent[branch.parents[i]] = true;
    tree.first = closed_blocks_;
    tree.of_nodes.assign(branch.nodes, -1);
    for (size_t i = 0; i < branch.nodes; ++i) {
        const int32_t above = branch.parents[i];
        if (above >= 0) tree.of_nodes[i] = ends[above] >= 0 ? ends[above] : tree.of_nodes[above];
        const size_t position = length + depths_[first_[b] + i];
        if (!parent[i] || !fills(position)) continue;
        const size_t block = position / kCacheBlock;
        int32_t before = tree.of_nodes[i];
        if (before >= 0 && tree.blocks[before].block == block) before = tree.blocks[before].before;
        ends[i] = static_cast<int32_t>(tree.blocks.size());
        tree.blocks.push_back({block, before});
        std::vector<int32_t> path;  // slots of the block's rows, the last one first
        int32_t node = static_cast<int32_t>(i);
        for (size_t at = position + 1; at-- > block * kCacheBlock;) {
            if (at < from) break;
            path.push_back(node >= 0 ? static_cast<int32_t>(kCacheGroup) + node
                                     : static_cast<int32_t>(at - from));
            if (node >= 0) node = branch.parents[node];
        }
        std::ranges::reverse(path);
        closings_.push_back({b, group_of(position), closed_blocks_, std::move(path)});
        ++closed_blocks_;
    }
    if (tree.blocks.empty()) tree.of_nodes.clear();
}

void Pass::close(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const size_t heads = shape_.layers[layer].kv_heads;
    const auto [begin, end] = chunk_range(closings_.size() * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const Closing& closing = closings_[item / heads];
        const size_t head = item % heads;
        const KVCache& cache = *batch_[closing.branch].cache;
        if (chain_[closing.branch]) {
            cache.close_chain(layer, head, closing.position);
            continue;
        }
        uint8_t* block = work_.closed.bytes() + closing.closed * cache.stride(layer) +
                         head * cache.block_bytes(layer);
        const size_t half = closing.position % kCacheBlock / kCacheGroup;
        const size_t halves = closing.slots.size() / kCacheGroup;
        if (halves <= half)
            std::memcpy(block, cache.data()[closing.position / kCacheBlock] +
                                   cache.offset(layer, head),
                        cache.block_bytes(layer));
        for (size_t i = 0; i < halves; ++i)
            cache.close(layer, head, closing.slots.data() + i * kCacheGroup, block,
                        half + 1 - halves + i);
    }
}

}  // namespace paceline

// Keys and values of one sequence, in pages of 64 positions: a page is [layer][head][block].
//
// The kernels know what a block looks like. Nodes that are not committed yet lie behind the
// committed positions, in the order of their tree. Forks share pages; who writes behind positions
// that others hold, too, copies the page first.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/page_pool.hpp"
#include "engine/shape.hpp"

namespace paceline {

// Where the layers lie in a page.
struct PageLayout {
    PageLayout(const Shape& shape, const CacheKernels& kernels);

    const CacheKernels* kernels;
    struct Layer {
        size_t heads, dim, block, offset;  // bytes of one head's block, and of the layers before
    };
    std::vector<Layer> layers;
    size_t bytes = 0;
};

class KVCache {
public:
    KVCache(const PageLayout& layout, PagePool& memory) : layout_(&layout), memory_(&memory) {}
    KVCache(KVCache&&) = default;
    ~KVCache() { keep(0); }

    size_t length() const { return length_; }
    size_t bytes() const { return pages_.size() * layout_->bytes; }
    const std::vector<Page*>& pages() const { return pages_; }

    // Pages that `nodes` behind the committed positions want besides those that are there.
    size_t missing(size_t nodes) const;
    // The page that must be copied before nodes are written; null if there is none.
    Page* copied_first() const;
    // Room for `nodes` behind the committed positions. Forgets earlier nodes.
    void prepare(size_t nodes);
    // Remembers the tree that the nodes belong to, for `commit`; that of a view is refused there.
    void remember(const int32_t* parents, size_t nodes, bool viewed) {
        parents_.assign(parents, parents + nodes);
        viewed_ = viewed;
    }
    // Keeps the nodes of `path`, root first. Throws std::invalid_argument if it is not a path.
    void commit(const int32_t* path, size_t count);
    // Throws std::invalid_argument if `length` is more than there is.
    void truncate(size_t length);
    // Shares every page; takes none.
    KVCache fork() const;

    // Bytes of one head's block, and of all heads' blocks for the same positions.
    size_t block_bytes(size_t layer) const { return layout_->layers[layer].block; }
    size_t stride(size_t layer) const { return block_bytes(layer) * layout_->layers[layer].heads; }
    // Where pages begin, and where in a page the block of a head does.
    const uint8_t* const* data() const { return data_.data(); }
    size_t offset(size_t layer, size_t head) const {
        return layout_->layers[layer].offset + head * block_bytes(layer);
    }
    void put(size_t layer, size_t head, size_t position, const float* key, const float* value) {
        layout_->kernels->put(block(layer, head, position), position % kCacheBlock,
                              layout_->layers[layer].dim, key, value);
    }
    // Copies `count` positions of one panel to places of one panel, from `to` on, of another block.
    void copy(size_t layer, size_t head, size_t position, uint8_t* block, size_t to,
              size_t count = 1) const {
        layout_->kernels->copy(this->block(layer, head, position), position % kCacheBlock, block,
                               to, count, layout_->layers[layer].dim);
    }

private:
    uint8_t* block(size_t layer, size_t head, size_t position) const {
        return pages_[position / kCacheBlock]->data + offset(layer, head);
    }
    void add(Page* page);
    void keep(size_t pages);
    void move(size_t from, size_t to);

    const PageLayout* layout_;
    PagePool* memory_;
    std::vector<Page*> pages_;
    std::vector<const uint8_t*> data_;  // of the pages
    std::vector<int32_t> parents_;  // of the last tree; empty when there is nothing to commit
    bool viewed_ = false;           // that tree saw a part of the model only
    size_t length_ = 0;
};

}  // namespace paceline

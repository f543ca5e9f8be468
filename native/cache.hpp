// Keys and values of one sequence, in blocks of 64 positions: [position / 64][head][block].
//
// The kernels know what a block looks like. Nodes that are not committed yet lie behind the
// committed positions, in the order of their tree.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "shape.hpp"

class Cache {
public:
    Cache(const Shape& shape, const CacheKernels& kernels);
    Cache(Cache&&) = default;
    Cache& operator=(Cache&&) = default;

    size_t length() const { return length_; }
    size_t bytes() const;

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
    Cache fork() const;

    // Bytes of one head's block, and of all heads' blocks for the same positions.
    size_t block_bytes(size_t layer) const { return block_bytes_[layer]; }
    size_t stride(size_t layer) const { return block_bytes(layer) * shape_->layers[layer].kv_heads; }
    uint8_t* block(size_t layer, size_t head, size_t position) const {
        return layers_[layer].bytes() + position / kCacheBlock * stride(layer) +
               head * block_bytes(layer);
    }
    void put(size_t layer, size_t head, size_t position, const float* key, const float* value) {
        kernels_->put(block(layer, head, position), position % kCacheBlock,
                      shape_->layers[layer].head_dim, key, value);
    }
    // Copies `count` positions of one panel to places of one panel, from `to` on, of another block.
    void copy(size_t layer, size_t head, size_t position, uint8_t* block, size_t to,
              size_t count = 1) const {
        kernels_->copy(this->block(layer, head, position), position % kCacheBlock, block, to, count,
                       shape_->layers[layer].head_dim);
    }

private:
    void resize(size_t blocks);
    void move(size_t from, size_t to);

    const Shape* shape_;
    const CacheKernels* kernels_;
    std::vector<size_t> block_bytes_;
    std::vector<Buffer> layers_;
    std::vector<int32_t> parents_;  // of the last tree; empty when there is nothing to commit
    bool viewed_ = false;           // that tree saw a part of the model only
    size_t length_ = 0, blocks_ = 0;
};

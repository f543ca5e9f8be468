// Keys and values of one sequence.
//
// Keys lie in panels of sixteen positions, [position / 16][D][16], so that scores are products
// like any other; values as [D / 16][position][16]. Nodes that are not committed yet lie behind
// the committed positions, in the order of their tree.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "shape.hpp"

class Cache {
public:
    explicit Cache(const Shape& shape) : shape_(&shape), layers_(shape.layers.size()) {}
    Cache(Cache&&) = default;
    Cache& operator=(Cache&&) = default;

    size_t length() const { return length_; }
    size_t capacity() const { return capacity_; }
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

    const float* keys(size_t layer, size_t head) const;    // [capacity / 16][D][16]
    const float* values(size_t layer, size_t head) const;  // [D / 16][capacity][16]
    void put(size_t layer, size_t head, size_t position, const float* key, const float* value);
    // Copies a position's key and value to place `to` of buffers with room for `room` positions.
    void copy(size_t layer, size_t head, size_t position, float* keys, float* values, size_t to,
              size_t room) const;

private:
    struct Layer {
        Buffer keys, values;
    };
    void grow(size_t capacity);
    void move(size_t from, size_t to);
    Layer resized(size_t layer, size_t capacity) const;

    const Shape* shape_;
    std::vector<Layer> layers_;
    std::vector<int32_t> parents_;  // of the last tree; empty when there is nothing to commit
    bool viewed_ = false;           // that tree saw a part of the model only
    size_t length_ = 0, capacity_ = 0;
};

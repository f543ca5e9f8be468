#include "cache.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace {

size_t blocks_for(size_t positions) { return (positions + kCacheBlock - 1) / kCacheBlock; }

}  // namespace

Cache::Cache(const Shape& shape, const CacheKernels& kernels)
    : shape_(&shape), kernels_(&kernels), layers_(shape.layers.size()) {
    for (const LayerShape& layer : shape.layers)
        block_bytes_.push_back(kernels.block_bytes(layer.head_dim));
}

size_t Cache::bytes() const {
    size_t total = 0;
    for (const Buffer& layer : layers_) total += layer.size();
    return total;
}

void Cache::prepare(size_t nodes) {
    parents_.clear();
    const size_t needed = blocks_for(length_ + nodes);
    if (needed > blocks_) resize(std::max(needed, blocks_ + blocks_ / 2));
}

// Room for `blocks` blocks of each layer, no fewer than the committed positions take.
void Cache::resize(size_t blocks) {
    std::vector<Buffer> layers;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        const Buffer& grown = layers.emplace_back(blocks * stride(layer));
        if (length_)
            std::memcpy(grown.bytes(), layers_[layer].bytes(),
                        blocks_for(length_) * stride(layer));
    }
    layers_ = std::move(layers);
    blocks_ = blocks;
}

Cache Cache::fork() const {
    Cache copy(*shape_, *kernels_);
    copy.blocks_ = blocks_for(length_);
    copy.length_ = length_;
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        copy.layers_[layer] = Buffer(copy.blocks_ * stride(layer));
        if (length_)
            std::memcpy(copy.layers_[layer].bytes(), layers_[layer].bytes(),
                        copy.layers_[layer].size());
    }
    return copy;
}

void Cache::move(size_t from, size_t to) {
    for (size_t layer = 0; layer < layers_.size(); ++layer)
        for (size_t head = 0; head < shape_->layers[layer].kv_heads; ++head)
            copy(layer, head, from, block(layer, head, to), to % kCacheBlock);
}

void Cache::commit(const int32_t* path, size_t count) {
    if (parents_.empty()) throw std::invalid_argument("there is no forward pass to commit");
    if (viewed_) throw std::invalid_argument("the last forward pass was a view, to draft only");
    for (size_t i = 0; i < count; ++i) {
        const bool inside = path[i] >= 0 && static_cast<size_t>(path[i]) < parents_.size();
        if (!inside || parents_[path[i]] != (i ? path[i - 1] : -1))
            throw std::invalid_argument("node " + std::to_string(path[i]) + " at place " +
                                        std::to_string(i) + " does not continue the path");
    }
    for (size_t i = 0; i < count; ++i)
        if (static_cast<size_t>(path[i]) != i) move(length_ + path[i], length_ + i);
    length_ += count;
    parents_.clear();
}

void Cache::truncate(size_t length) {
    if (length > length_)
        throw std::invalid_argument("cannot truncate " + std::to_string(length_) +
                                    " positions to " + std::to_string(length));
    length_ = length;
    parents_.clear();
}

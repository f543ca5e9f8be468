#include "engine/kv_cache.hpp"

#include <stdexcept>
#include <string>

namespace paceline {

namespace {

size_t pages_for(size_t positions) { return (positions + kCacheBlock - 1) / kCacheBlock; }

}  // namespace

PageLayout::PageLayout(const Shape& shape, const CacheKernels& given) : kernels(&given) {
    for (const LayerShape& layer : shape.layers) {
        const size_t block = given.block_bytes(layer.head_dim);
        layers.push_back({layer.kv_heads, layer.head_dim, block, bytes});
        bytes += layer.kv_heads * block;
    }
}

Page* KVCache::copied_first() const {
    if (length_ % kCacheBlock == 0) return nullptr;
    Page* last = pages_[length_ / kCacheBlock];
    return memory_->holders(last) > 1 ? last : nullptr;
}

size_t KVCache::missing(size_t nodes) const {
    const size_t wanted = pages_for(length_ + nodes);
    return wanted > pages_.size() ? wanted - pages_.size() : 0;
}

void KVCache::prepare(size_t nodes) {
    parents_.clear();
    if (Page* shared = copied_first()) {
        Page* own = memory_->take();
        std::memcpy(own->data, shared->data, layout_->bytes);
        pages_[length_ / kCacheBlock] = own;
        data_[length_ / kCacheBlock] = own->data;
        memory_->drop(shared);
    }
    for (size_t more = missing(nodes); more > 0; --more) add(memory_->take());
}

void KVCache::add(Page* page) {
    pages_.push_back(page);
    data_.push_back(page->data);
}

// Gives the pages behind the first `count` back.
void KVCache::keep(size_t count) {
    for (; pages_.size() > count; pages_.pop_back(), data_.pop_back()) memory_->drop(pages_.back());
}

KVCache KVCache::fork() const {
    KVCache other(*layout_, *memory_);
    other.length_ = length_;
    other.pages_.reserve(pages_for(length_));
    other.data_.reserve(pages_for(length_));
    for (size_t i = 0; i < pages_for(length_); ++i) {
        memory_->hold(pages_[i]);
        other.add(pages_[i]);
    }
    return other;
}

void KVCache::move(size_t from, size_t to) {
    for (size_t layer = 0; layer < layout_->layers.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head)
            copy(layer, head, from, block(layer, head, to), to % kCacheBlock);
}

// Writes behind the committed positions only: a fork that was made since the pass, and so shares
// the page, does not read there and copies it before it writes.
void KVCache::commit(const int32_t* path, size_t count) {
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
    keep(pages_for(length_));
}

void KVCache::truncate(size_t length) {
    if (length > length_)
        throw std::invalid_argument("cannot truncate " + std::to_string(length_) +
                                    " positions to " + std::to_string(length));
    length_ = length;
    parents_.clear();
    keep(pages_for(length_));
}

}  // namespace paceline

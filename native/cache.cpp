#include "cache.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace {

size_t key_floats(const LayerShape& layer, size_t capacity) { return layer.head_dim * capacity; }
size_t value_floats(const LayerShape& layer, size_t capacity) {
    return padded(layer.head_dim) * capacity;
}

}  // namespace

size_t Cache::bytes() const {
    size_t total = 0;
    for (const Layer& layer : layers_) total += layer.keys.size() + layer.values.size();
    return total;
}

const float* Cache::keys(size_t layer, size_t head) const {
    return layers_[layer].keys.floats() + head * key_floats(shape_->layers[layer], capacity_);
}

const float* Cache::values(size_t layer, size_t head) const {
    return layers_[layer].values.floats() + head * value_floats(shape_->layers[layer], capacity_);
}

void Cache::put(size_t layer, size_t head, size_t position, const float* key, const float* value) {
    const size_t dim = shape_->layers[layer].head_dim;
    float* keys = const_cast<float*>(this->keys(layer, head)) +
                  position / kPanel * dim * kPanel + position % kPanel;
    for (size_t d = 0; d < dim; ++d) keys[d * kPanel] = key[d];
    float* values = const_cast<float*>(this->values(layer, head)) + position * kPanel;
    for (size_t d = 0; d < dim; d += kPanel, values += capacity_ * kPanel)
        std::memcpy(values, value + d, std::min(kPanel, dim - d) * sizeof(float));
}

void Cache::prepare(size_t nodes) {
    parents_.clear();
    const size_t needed = length_ + nodes;
    if (needed > capacity_) grow(padded(std::max(needed, capacity_ + capacity_ / 2)));
}

// The layer's committed positions in buffers of another capacity.
Cache::Layer Cache::resized(size_t layer, size_t capacity) const {
    const LayerShape& shape = shape_->layers[layer];
    Layer to{Buffer(shape.kv_heads * key_floats(shape, capacity) * sizeof(float)),
             Buffer(shape.kv_heads * value_floats(shape, capacity) * sizeof(float))};
    if (!length_) return to;
    const size_t value_bytes = length_ * kPanel * sizeof(float);
    for (size_t head = 0; head < shape.kv_heads; ++head) {
        std::memcpy(to.keys.floats() + head * key_floats(shape, capacity), keys(layer, head),
                    key_floats(shape, padded(length_)) * sizeof(float));
        for (size_t d = 0; d < padded(shape.head_dim); d += kPanel)
            std::memcpy(to.values.floats() + head * value_floats(shape, capacity) + d * capacity,
                        values(layer, head) + d * capacity_, value_bytes);
    }
    return to;
}

void Cache::grow(size_t capacity) {
    std::vector<Layer> layers;
    layers.reserve(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) layers.push_back(resized(i, capacity));
    layers_ = std::move(layers);
    capacity_ = capacity;
}

Cache Cache::fork() const {
    Cache copy(*shape_);
    const size_t capacity = padded(length_);
    if (capacity)
        for (size_t i = 0; i < layers_.size(); ++i) copy.layers_[i] = resized(i, capacity);
    copy.length_ = length_;
    copy.capacity_ = capacity;
    return copy;
}

void Cache::copy(size_t layer, size_t head, size_t position, float* keys, float* values, size_t to,
                 size_t room) const {
    const size_t dim = shape_->layers[layer].head_dim;
    const auto at = [&](size_t place) { return place / kPanel * dim * kPanel + place % kPanel; };
    const float* key = this->keys(layer, head) + at(position);
    keys += at(to);
    for (size_t d = 0; d < dim; ++d) keys[d * kPanel] = key[d * kPanel];
    const float* value = this->values(layer, head) + position * kPanel;
    for (size_t d = 0; d < padded(dim); d += kPanel)
        std::memcpy(values + d * room + to * kPanel, value + d * capacity_,
                    kPanel * sizeof(float));
}

void Cache::move(size_t from, size_t to) {
    for (size_t layer = 0; layer < layers_.size(); ++layer)
        for (size_t head = 0; head < shape_->layers[layer].kv_heads; ++head)
            copy(layer, head, from, const_cast<float*>(keys(layer, head)),
                 const_cast<float*>(values(layer, head)), to, capacity_);
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

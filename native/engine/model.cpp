#include "engine/model.hpp"

#include <algorithm>
#include <stdexcept>

namespace paceline {

Model::Model(Shape given, const Kernels& kernels, const FormatKernels& format,
             const FormatKernels& head, CacheChoice cache, size_t threads, const FewRead* few_read)
    : shape(std::move(given)),
      kernels(kernels),
      cache_kernels(*cache.kernels),
      packed(cache.packed),
      few_read_kernels(few_read ? cache.few_read : nullptr),
      layout(shape, cache_kernels, packed, few_read_kernels,
             few_read ? *few_read : FewRead{}),
      memory(layout.bytes),
      weights(shape, format, head),
      ropes(shape.ropes),
      few_read(few_read ? *few_read : FewRead{}),
      pool_(std::make_unique<Pool>(threads)) {}

void Model::stream_weights(const std::string& path, size_t budget) {
    stream = std::make_unique<WeightStream>(path, budget, shape.layers.size());
}

// Gives a layer that has just been completed to the stream.
void Model::place(const std::string& name) {
    if (stream && name == "embed" && !shape.tied)
        stream->place_rows(weights.untied_embedding.matrices()[0]);
    const std::optional<size_t> layer = stream ? weights.layer_index(name) : std::nullopt;
    if (layer && !stream->placed(*layer) && weights.complete(*layer))
        stream->place(*layer, weights.matrices_of(*layer), weights.other_bytes());
}

void Model::finish() {
    weights.check();
    if (stream && !stream->finish(weights.other_bytes())) stream.reset();
    bytes = weights.bytes();
    parameters = weights.parameters();
}

bool Model::make_screen() {
    if (screen) return true;
    if (!HeadScreen::fits(weights.head, shape.logit_softcap)) return false;
    screen = HeadScreen::copy(weights.head.matrices()[0], shape.vocabulary, *kernels.screen, *pool_);
    return bool(screen);
}

void Model::hidden(float* out) const {
    const size_t stride = padded(shape.hidden);
    for (size_t row = 0; row < hidden_rows; ++row)
        std::copy_n(work.normed.floats() + row * stride, shape.hidden, out + row * shape.hidden);
}

void Model::set_threads(size_t threads) {
    if (threads != pool_->size()) pool_ = std::make_unique<Pool>(threads);
}

size_t Model::rope_positions() const {
    size_t covered = SIZE_MAX;
    for (const LayerShape& layer : shape.layers)
        if (layer.rope >= 0)
            covered = std::min(covered, ropes[layer.rope].cosines.size() / (layer.rope_dim / 2));
    return covered;
}

void Model::extend_rope(size_t index, const float* cosines, const float* sines, size_t count) {
    RopeTable& table = ropes.at(index);
    table.cosines.insert(table.cosines.end(), cosines, cosines + count);
    table.sines.insert(table.sines.end(), sines, sines + count);
}

}  // namespace paceline

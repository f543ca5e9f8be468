// The part of a pass that works on single rows: embeddings, norms, sums, rotary embeddings.

#include <algorithm>
#include <cmath>

#include "engine/pass.hpp"

namespace paceline {

namespace {

// The first `dim` values of a head, rotated in halves.
void rotate_halves(float* head, const float* cosines, const float* sines, size_t dim) {
    const size_t half = dim / 2;
    for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

// The first `dim` values of a head, rotated in adjacent pairs.
void rotate_pairs(float* head, const float* cosines, const float* sines, size_t dim) {
    for (size_t i = 0; i < dim / 2; ++i) {
        const float a = head[2 * i], b = head[2 * i + 1];
        head[2 * i] = a * cosines[i] - b * sines[i];
        head[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
}

// What queries at a position are multiplied by.
float query_scale(const LayerShape& shape, float scale, size_t position) {
    if (shape.rope < 0 || !shape.query_growth) return scale;
    const auto periods = static_cast<float>(position / shape.query_length);
    return scale * (1.0f + shape.query_growth * std::log(1.0f + periods));
}

void scale_row(float* row, float scale, size_t size) {
    if (scale == 1.0f) return;
    for (size_t i = 0; i < size; ++i) row[i] *= scale;
}

}  // namespace

// A weight of 0 adds nothing, and a single weight of 1 changes no bit.
void Pass::mix(const Branch& branch, size_t node, float* x, float* other) {
    bool first = true;
    for (size_t i = node * branch.mixed; i < (node + 1) * branch.mixed; ++i) {
        const float weight = branch.weights ? branch.weights[i] : 1.0f;
        if (weight == 0.0f) continue;
        float* to = first ? x : other;
        const Matrix& embedding = model_.weights.embedding();
        const auto token = static_cast<size_t>(branch.tokens[i]);
        const float scale = shape_.embedding_scale * weight;
        if (!embedding.streamed)
            embedding.unpack(token, scale, to);
        else if (!model_.stream->unpack(embedding, token, scale, to))
            failed_ = true;
        if (!first)
            for (size_t k = 0; k < shape_.hidden; ++k) x[k] += other[k];
        first = false;
    }
    if (first) std::fill_n(x, shape_.hidden, 0.0f);
}

void Pass::embed(size_t, size_t chunk, size_t chunks, Buffer& scratch) {
    const Weights& weights = model_.weights;
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        const Branch& branch = batch_[branch_of_[i]];
        float* x = row(work_.x, i, hidden_);
        if (branch.states) {
            const size_t node = i - first_[branch_of_[i]];
            std::copy_n(branch.states + node * shape_.hidden, shape_.hidden, x);
            continue;
        }
        mix(branch, i - first_[branch_of_[i]], x, scratch.floats());
        if (!shape_.learned_positions) continue;
        const size_t position = branch.cache->length() + depths_[i] + shape_.position_offset;
        const float* from = weights.positions.floats() + position * shape_.hidden;
        for (size_t k = 0; k < shape_.hidden; ++k) x[k] += from[k];
    }
}

void Pass::norm_row(const Norm& norm, const float* row, float* out, size_t size) const {
    kernels_.norm({norm.weight.floats(), norm.bias.floats(), size, shape_.norm_eps,
                   shape_.centred_norm},
                  row, out);
}

// The norm behind the last attention or MLP that ran before `layer`; null if there was none.
const Norm* Pass::norm_before(size_t layer) const {
    auto at = std::lower_bound(layers_.begin(), layers_.end(), layer);
    while (at != layers_.begin()) {
        const size_t before = *--at;
        if (shape_.layers[before].intermediate) return &model_.weights.layers[before].mlp_post_norm;
        if (shape_.layers[before].heads) return &model_.weights.layers[before].attn_post_norm;
    }
    return nullptr;
}

// Adds a row y, normed and scaled if the model says so, to the residual stream.
void Pass::merge(const Norm& post, float* x, float* y) const {
    if (post) norm_row(post, y, y, shape_.hidden);
    scale_row(y, shape_.residual_scale, hidden_);
    kernels_.add(x, y, hidden_);
}

// The input of attention or of the MLP; a model with norms behind them only has none before.
void Pass::enter(const Norm& norm, const float* x, float* out) const {
    if (norm)
        norm_row(norm, x, out, shape_.hidden);
    else
        std::copy_n(x, hidden_, out);
}

void Pass::enter_attention(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const Norm* before = norm_before(layer);
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* x = row(work_.x, i, hidden_);
        if (before) merge(*before, x, row(work_.y, i, hidden_));
        enter(model_.weights.layers[layer].attn_norm, x, row(work_.normed, i, hidden_));
    }
}

void Pass::attention_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i)
        norm_row(model_.weights.layers[layer].attn_inner_norm, row(work_.attended, i, attended_),
                 row(work_.attended, i, attended_), shape_.layers[layer].query_size());
}

void Pass::enter_mlp(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const bool attends = shape_.layers[layer].heads > 0, parallel = attends && shape_.parallel;
    const Norm* before = attends ? &weights.attn_post_norm : norm_before(layer);
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* x = row(work_.x, i, hidden_);
        float* normed = row(work_.normed, i, hidden_);
        if (parallel) enter(weights.mlp_norm, x, normed);
        if (before) merge(*before, x, row(work_.y, i, hidden_));
        if (!parallel) enter(weights.mlp_norm, x, normed);
    }
}

void Pass::mlp_inner_norm(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i)
        norm_row(model_.weights.layers[layer].mlp_inner_norm, row(work_.wide, i, wide_),
                 row(work_.wide, i, wide_), shape_.layers[layer].intermediate);
}

// The residual stream of a node with what the last attention or MLP adds to it. Leaves x and y as
// they are: behind an exit, the next layer goes on from them.
const float* Pass::merged_state(const Norm* before, size_t node, Buffer& scratch) const {
    const float* x = row(work_.x, node, hidden_);
    if (!before) return x;
    float *merged = scratch.floats(), *y = merged + hidden_;
    std::copy_n(x, hidden_, merged);
    std::copy_n(row(work_.y, node, hidden_), hidden_, y);
    merge(*before, merged, y);
    return merged;
}

void Pass::leave(size_t layer, size_t chunk, size_t chunks, Buffer& scratch) {
    const Norm* before = norm_before(layer);
    const auto [begin, end] = chunk_range(headed_.size(), chunk, chunks);
    for (size_t k = begin; k < end; ++k)
        std::copy_n(merged_state(before, headed_[k], scratch), shape_.hidden,
                    logits_ + k * shape_.hidden);
}

void Pass::enter_head(size_t layer, size_t chunk, size_t chunks, Buffer& scratch) {
    const Norm* before = norm_before(layer);
    const auto [begin, end] = chunk_range(headed_.size(), chunk, chunks);
    for (size_t k = begin; k < end; ++k) {
        const float* x = merged_state(before, headed_[k], scratch);
        float* out = row(work_.normed, k, hidden_);
        norm_row(model_.weights.final_norm, x, out, shape_.hidden);
        scale_row(out, shape_.logit_scale, hidden_);
    }
}

void Pass::norm_head(const Norm& norm, float* head, size_t dim) const {
    if (!norm) return;
    alignas(64) float row[kLargestHead] = {};
    std::copy_n(head, dim, row);
    norm_row(norm, row, row, dim);
    std::copy_n(row, dim, head);
}

// Clips queries, keys and values, and norms queries and keys over all heads at once.
void Pass::bound_qkv(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const LayerWeights& weights = model_.weights.layers[layer];
    const float clip = shape_.qkv_clip;
    const auto [begin, end] = chunk_range(n_, chunk, chunks);
    for (size_t i = begin; i < end; ++i) {
        float* qkv = row(work_.qkv, i, qkv_);
        for (size_t d = 0; clip && d < shape.qkv_size(); ++d)
            qkv[d] = std::clamp(qkv[d], -clip, clip);
        if (shape_.qk_norm != QKNorm::width) continue;
        float* keys = qkv + shape.keys_at();
        if (weights.q_norm) norm_row(weights.q_norm, qkv, qkv, shape.query_size());
        if (weights.k_norm) norm_row(weights.k_norm, keys, keys, shape.kv_size());
    }
}

// Norms and rotates queries and keys, and puts keys and values into the caches.
void Pass::rotate(size_t layer, size_t chunk, size_t chunks, Buffer&) {
    const LayerShape& shape = shape_.layers[layer];
    const LayerWeights& weights = model_.weights.layers[layer];
    const size_t dim = shape.head_dim, heads = shape.heads + shape.kv_heads;
    const auto [begin, end] = chunk_range(n_ * heads, chunk, chunks);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / heads, head = item % heads;
        const Branch& branch = batch_[branch_of_[node]];
        const size_t position = branch.cache->length() + depths_[node];
        const bool query = head < shape.heads;
        float* qkv = row(work_.qkv, node, qkv_);
        float* values = query ? qkv + head * dim
                              : qkv + shape.keys_at() + (head - shape.heads) * dim;
        const Norm& norm = query ? weights.q_norm : weights.k_norm;
        if (shape_.qk_norm == QKNorm::head) norm_head(norm, values, dim);
        if (shape.rope >= 0) {
            const RopeTable& rope = model_.ropes[shape.rope];
            const size_t at = position * (shape.rope_dim / 2);
            (shape.rope_adjacent ? rotate_pairs : rotate_halves)(
                values, rope.cosines.data() + at, rope.sines.data() + at, shape.rope_dim);
        }
        if (shape_.qk_norm == QKNorm::rotated) norm_head(norm, values, dim);
        if (query) {
            const float scale = query_scale(shape, shape_.attention_scale, position);
            for (size_t d = 0; d < dim; ++d) values[d] *= scale;
            if (!keeps_queries(branch)) continue;
            const size_t at = (node - first_[branch_of_[node]]) * shape.query_size() + head * dim;
            std::copy_n(values, dim, branch.cache->queries(layer) + at);
        } else {
            const size_t kv = head - shape.heads;
            branch.cache->put(layer, kv, node - first_[branch_of_[node]], values,
                              qkv + shape.values_at() + kv * dim);
        }
    }
}

}  // namespace paceline

#include "pass.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace {

// The first `dim` values of a head, rotated in halves.
void rotate_head(float* head, const float* cosines, const float* sines, size_t dim) {
    const size_t half = dim / 2;
    for (size_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

}  // namespace

Pass::Pass(Model& model, const std::vector<Branch>& batch, float* logits)
    : model_(model),
      shape_(model.shape),
      kernels_(model.kernels),
      work_(model.work_),
      batch_(batch),
      logits_(logits),
      hidden_(padded(model.shape.hidden)) {
    for (const Branch& branch : batch) {
        first_.push_back(n_);
        check(branch);
        n_ += branch.nodes;
    }
    threads_ = model.threads_for(n_);
    for (const Branch& branch : batch) branch.cache->prepare(branch.nodes);
    reserve();
}

void Pass::check(const Branch& branch) {
    const auto refuse = [](const std::string& message) { throw std::invalid_argument(message); };
    const size_t first = depths_.size(), length = branch.cache->length();
    const size_t limit = std::min(shape_.context, model_.rope_positions());
    bool chain = true;
    if (!branch.nodes) refuse("a tree needs a root");
    for (size_t i = 0; i < branch.nodes; ++i) {
        const int32_t token = branch.tokens[i], parent = branch.parents[i];
        if (token < 0 || static_cast<size_t>(token) >= shape_.vocabulary)
            refuse("token " + std::to_string(token) + " is outside the vocabulary of " +
                   std::to_string(shape_.vocabulary));
        if (i ? parent < 0 || static_cast<size_t>(parent) >= i : parent != -1)
            refuse("node " + std::to_string(i) + " has parent " + std::to_string(parent));
        depths_.push_back(i ? depths_[first + parent] + 1 : 0);
        branch_of_.push_back(first_.size() - 1);
        chain = chain && parent == static_cast<int32_t>(i) - 1;
        if (length + depths_.back() >= limit)
            refuse("position " + std::to_string(length + depths_.back() + 1) +
                   " is beyond the context of " + std::to_string(limit));
    }
    chain_.push_back(chain);
}

void Pass::reserve() {
    size_t scratch = 0, arranged = 0;
    const auto product = [&](const Matrix& matrix) {
        if (!matrix.format) return;
        scratch = std::max(scratch, matrix.format->scratch_bytes(n_));
        arranged = std::max(arranged, matrix.format->arranged_bytes(n_, matrix.inputs));
    };
    product(model_.weights.head);
    for (size_t i = 0; i < shape_.layers.size(); ++i) {
        const LayerShape& layer = shape_.layers[i];
        wide_ = std::max(wide_, padded(layer.intermediate));
        qkv_ = std::max(qkv_, layer.qkv_size());
        attended_ = std::max(attended_, padded(layer.query_size()));
        const LayerWeights& weights = model_.weights.layers[i];
        for (const Matrix* matrix : {&weights.qkv, &weights.o, &weights.gate_up, &weights.down})
            product(*matrix);
        for (const Branch& branch : batch_)
            scratch = std::max(scratch, kernels_.attention_bytes(
                                            attention_tile(layer, branch.nodes),
                                            branch.cache->length() + branch.nodes,
                                            layer.head_dim));
        scratch = std::max(scratch, 2 * padded(layer.head_dim) * sizeof(float));
    }
    // Padding is read by norms: it must be zero, and nothing else is ever written there.
    const auto rows = [&](Buffer& buffer, size_t stride) {
        if (buffer.size() >= n_ * stride * sizeof(float)) return;
        buffer.reserve(n_ * stride * sizeof(float));
        buffer.zero();
    };
    rows(work_.x, hidden_);
    rows(work_.normed, hidden_);
    rows(work_.y, hidden_);
    rows(work_.qkv, qkv_);
    rows(work_.attended, attended_);
    rows(work_.wide, wide_);
    work_.arranged.reserve(arranged);
    work_.scratch.resize(threads_);
    for (Buffer& buffer : work_.scratch) buffer.reserve(scratch + 4096);
}

void Pass::remember() {
    for (const Branch& branch : batch_) branch.cache->remember(branch.parents, branch.nodes);
}

void Pass::run(size_t thread) {
    embed(thread);
    for (size_t layer = 0; layer < shape_.layers.size(); ++layer) {
        attention_block(thread, layer);
        // Without logits the last layer is run for its keys and values only.
        if (!logits_ && layer + 1 == shape_.layers.size()) return;
        mlp_block(thread, layer);
    }
    if (logits_) head(thread);
}

void Pass::embed(size_t thread) {
    const Weights& weights = model_.weights;
    const float scale = shape_.embedding_scale;
    const auto [begin, end] = share(n_, thread, threads_);
    for (size_t i = begin; i < end; ++i) {
        const Branch& branch = batch_[branch_of_[i]];
        const size_t token = branch.tokens[i - first_[branch_of_[i]]];
        float* row = work_.x.floats() + i * hidden_;
        if (shape_.tied) {
            weights.head.unpack(token, scale, row);
        } else {
            const float* from = weights.embedding.floats() + token * shape_.hidden;
            for (size_t k = 0; k < shape_.hidden; ++k) row[k] = from[k] * scale;
        }
        if (!shape_.learned_positions) continue;
        const size_t position = branch.cache->length() + depths_[i] + shape_.position_offset;
        const float* from = weights.positions.floats() + position * shape_.hidden;
        for (size_t k = 0; k < shape_.hidden; ++k) row[k] += from[k];
    }
}

NormJob Pass::norm_job(const Norm& norm, size_t size) const {
    return {norm.weight.floats(), norm.bias.floats(), size, shape_.norm_eps, shape_.centred_norm};
}

// Adds row `row` of y, normed if the layer says so, to the residual stream.
void Pass::merge(const Norm& post, size_t row) {
    float* y = work_.y.floats() + row * hidden_;
    if (post) kernels_.norm(norm_job(post, shape_.hidden), y, y);
    kernels_.add(work_.x.floats() + row * hidden_, y, hidden_);
}

void Pass::norm_rows(size_t thread, const Norm& norm, const float* rows, float* out, size_t size,
                     size_t stride) {
    const NormJob job = norm_job(norm, size);
    const auto [begin, end] = share(n_, thread, threads_);
    for (size_t i = begin; i < end; ++i) kernels_.norm(job, rows + i * stride, out + i * stride);
}

// All threads have met before, so `rows` is whole; they meet again when `job.out` is.
void Pass::multiply(size_t thread, const Matrix& matrix, const float* rows, size_t stride,
                    Product job) {
    const FormatKernels& format = *matrix.format;
    job.panels = matrix.data.bytes();
    job.panel_bytes = matrix.panel_bytes;
    job.inputs = matrix.inputs;
    job.n = n_;
    job.x = rows;
    if (format.arranged_bytes(n_, matrix.inputs)) {
        format.arrange(rows, stride, n_, matrix.inputs, work_.arranged.bytes(), thread, threads_);
        job.x = work_.arranged.bytes();
        meet();
    }
    const auto [begin, end] = share(matrix.panels, thread, threads_, job.gated ? 2 : 1);
    format.multiply(job, begin, end, work_.scratch[thread].bytes());
    meet();
}

void Pass::attention_block(size_t thread, size_t layer) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const LayerShape& shape = shape_.layers[layer];
    if (layer) {
        const auto [begin, end] = share(n_, thread, threads_);
        for (size_t i = begin; i < end; ++i)
            merge(model_.weights.layers[layer - 1].mlp_post_norm, i);
    }
    norm_rows(thread, weights.attn_norm, work_.x.floats(), work_.normed.floats(), shape_.hidden,
              hidden_);
    meet();
    multiply(thread, weights.qkv, work_.normed.floats(), hidden_,
             {.bias = weights.qkv_bias.floats(), .out = work_.qkv.floats(), .stride = qkv_,
              .rows = shape.qkv_size()});
    rotate(thread, layer);
    meet();
    if (!logits_ && layer + 1 == shape_.layers.size()) return;
    attend(thread, layer);
    meet();
    if (weights.attn_inner_norm) {
        norm_rows(thread, weights.attn_inner_norm, work_.attended.floats(),
                  work_.attended.floats(), shape.query_size(), attended_);
        meet();
    }
    multiply(thread, weights.o, work_.attended.floats(), attended_,
             {.bias = weights.o_bias.floats(), .out = work_.y.floats(), .stride = hidden_,
              .rows = hidden_});
}

void Pass::mlp_block(size_t thread, size_t layer) {
    const LayerWeights& weights = model_.weights.layers[layer];
    const LayerShape& shape = shape_.layers[layer];
    const NormJob job = norm_job(weights.mlp_norm, shape_.hidden);
    const auto [begin, end] = share(n_, thread, threads_);
    for (size_t i = begin; i < end; ++i) {
        const float* x = work_.x.floats() + i * hidden_;
        float* normed = work_.normed.floats() + i * hidden_;
        if (shape_.parallel) kernels_.norm(job, x, normed);
        merge(weights.attn_post_norm, i);
        if (!shape_.parallel) kernels_.norm(job, x, normed);
    }
    meet();
    multiply(thread, weights.gate_up, work_.normed.floats(), hidden_,
             {.bias = weights.gate_up_bias.floats(), .activation = shape_.activation,
              .gated = shape_.gated, .out = work_.wide.floats(), .stride = wide_,
              .rows = padded(shape.intermediate)});
    if (weights.mlp_inner_norm) {
        norm_rows(thread, weights.mlp_inner_norm, work_.wide.floats(), work_.wide.floats(),
                  shape.intermediate, wide_);
        meet();
    }
    multiply(thread, weights.down, work_.wide.floats(), wide_,
             {.bias = weights.down_bias.floats(), .out = work_.y.floats(), .stride = hidden_,
              .rows = hidden_});
}

void Pass::head(size_t thread) {
    const Weights& weights = model_.weights;
    const auto [begin, end] = share(n_, thread, threads_);
    if (!weights.layers.empty())
        for (size_t i = begin; i < end; ++i) merge(weights.layers.back().mlp_post_norm, i);
    norm_rows(thread, weights.final_norm, work_.x.floats(), work_.normed.floats(), shape_.hidden,
              hidden_);
    meet();
    multiply(thread, weights.head, work_.normed.floats(), hidden_,
             {.bias = weights.head_bias.floats(), .softcap = shape_.logit_softcap, .out = logits_,
              .stride = shape_.vocabulary, .rows = shape_.vocabulary});
}

void Pass::norm_head(const Norm& norm, float* head, size_t dim) const {
    if (!norm) return;
    alignas(64) float row[1024] = {};
    std::copy_n(head, dim, row);
    kernels_.norm(norm_job(norm, dim), row, row);
    std::copy_n(row, dim, head);
}

// Norms and rotates queries and keys, and puts keys and values into the caches.
void Pass::rotate(size_t thread, size_t layer) {
    const LayerShape& shape = shape_.layers[layer];
    const LayerWeights& weights = model_.weights.layers[layer];
    const size_t dim = shape.head_dim, heads = shape.heads + shape.kv_heads;
    const auto [begin, end] = share(n_ * heads, thread, threads_);
    for (size_t item = begin; item < end; ++item) {
        const size_t node = item / heads, head = item % heads;
        const Branch& branch = batch_[branch_of_[node]];
        const size_t position = branch.cache->length() + depths_[node];
        const bool query = head < shape.heads;
        float* row = work_.qkv.floats() + node * qkv_;
        float* values = query ? row + head * dim
                              : row + shape.keys_at() + (head - shape.heads) * dim;
        norm_head(query ? weights.q_norm : weights.k_norm, values, dim);
        if (shape.rope >= 0) {
            const RopeTable& rope = model_.ropes_[shape.rope];
            const size_t at = position * (shape.rope_dim / 2);
            rotate_head(values, rope.cosines.data() + at, rope.sines.data() + at, shape.rope_dim);
        }
        if (query) {
            for (size_t d = 0; d < dim; ++d) values[d] *= shape_.attention_scale;
        } else {
            const size_t kv = head - shape.heads;
            branch.cache->put(layer, kv,
                              branch.cache->length() + node - first_[branch_of_[node]], values,
                              row + shape.values_at() + kv * dim);
        }
    }
}

// Queries that one call handles: few enough that every thread gets its part.
size_t Pass::attention_tile(const LayerShape& layer, size_t nodes) const {
    const size_t queries = nodes * (layer.heads / layer.kv_heads);
    const size_t fair = queries * layer.kv_heads / (2 * threads_);
    return std::clamp<size_t>(fair, 1, std::min(queries, kernels_.max_queries));
}

void Pass::attend(size_t thread, size_t layer) {
    const LayerShape& shape = shape_.layers[layer];
    size_t turn = 0;
    for (size_t b = 0; b < batch_.size(); ++b) {
        const Branch& branch = batch_[b];
        const Cache& cache = *branch.cache;
        const size_t group = shape.heads / shape.kv_heads, queries = branch.nodes * group;
        const size_t tile = attention_tile(shape, branch.nodes);
        for (size_t kv = 0; kv < shape.kv_heads; ++kv) {
            const Attention job{.keys = cache.keys(layer, kv),
                                .values = cache.values(layer, kv),
                                .head_dim = shape.head_dim,
                                .capacity = cache.capacity(),
                                .length = cache.length(),
                                .parents = branch.parents,
                                .depths = depths_.data() + first_[b],
                                .chain = chain_[b],
                                .window = shape.window,
                                .softcap = shape_.attention_softcap,
                                .queries = work_.qkv.floats() + first_[b] * qkv_,
                                .query_stride = qkv_,
                                .out = work_.attended.floats() + first_[b] * attended_,
                                .out_stride = attended_,
                                .first_head = kv * group,
                                .group = group};
            for (size_t query = 0; query < queries; query += tile, ++turn)
                if (turn % threads_ == thread)
                    kernels_.attend(job, query, std::min(query + tile, queries),
                                    work_.scratch[thread].bytes());
        }
    }
}

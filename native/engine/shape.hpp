// The shape of a decoder, read once from the Python `ModelConfig`.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.hpp"

namespace paceline {

struct LayerShape {
    size_t heads, kv_heads, head_dim, intermediate;
    size_t window;  // 0: all
    int rope;       // which table, -1: none
    size_t rope_dim;

    // Columns of one row of queries, keys and values; each part is padded to panels.
    size_t query_size() const { return heads * head_dim; }
    size_t kv_size() const { return kv_heads * head_dim; }
    size_t keys_at() const { return padded(query_size()); }
    size_t values_at() const { return keys_at() + padded(kv_size()); }
    size_t qkv_size() const { return values_at() + padded(kv_size()); }
};

struct Shape {
    size_t vocabulary, hidden, context;
    std::vector<LayerShape> layers;
    bool centred_norm;
    float norm_eps, norm_offset;
    Activation activation;
    bool gated, parallel, tied, learned_positions;
    size_t position_offset;
    float attention_scale, embedding_scale;
    float attention_softcap, logit_softcap;  // 0: none
    size_t ropes;
};

}  // namespace paceline

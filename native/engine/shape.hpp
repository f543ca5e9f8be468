// The shape of a decoder, read once from the Python `ModelConfig`.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernels.hpp"

namespace paceline {

// A layer without heads has no attention, one whose MLP has no width has none.
struct LayerShape {
    size_t heads, kv_heads, head_dim, intermediate;
    size_t window;  // 0: all
    size_t sinks;   // first positions, which are seen behind a window, too
    int rope;       // which table, -1: none
    size_t rope_dim;
    bool rope_adjacent;  // values 2i and 2i + 1 turn together, not i and i + rope_dim / 2
    // Queries at position p are multiplied by 1 + query_growth log(1 + floor(p / query_length)).
    float query_growth;
    size_t query_length;

    // Query heads that share a key/value head; only of a layer with attention.
    size_t group() const { return heads / kv_heads; }

    // Columns of one row of queries, keys and values; each part is padded to panels.
    size_t query_size() const { return heads * head_dim; }
    size_t kv_size() const { return kv_heads * head_dim; }
    size_t keys_at() const { return padded(query_size()); }
    size_t values_at() const { return keys_at() + padded(kv_size()); }
    size_t qkv_size() const { return values_at() + padded(kv_size()); }
};

// Where the norms of queries and keys apply: to each head, to all heads at once, or to each head
// behind the rotary embedding.
enum class QKNorm { head, width, rotated };

struct Shape {
    size_t vocabulary, hidden, context;
    std::vector<LayerShape> layers;
    bool centred_norm, weighted_norm;
    float norm_eps, norm_offset;
    Activation activation;
    bool gated, parallel, pre_norm, tied, learned_positions;
    QKNorm qk_norm;
    size_t position_offset;
    float attention_scale, embedding_scale, residual_scale, logit_scale;
    float attention_softcap, logit_softcap, qkv_clip;  // 0: none
    size_t ropes;
    // Whether these are the first layers of the decoder, behind the embedding, and the last ones,
    // before the head. Other parts are given hidden states, and give hidden states.
    bool begins = true, ends = true;
};

}  // namespace paceline

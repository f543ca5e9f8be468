// Which keys represent a panel of the cache: those that the queries behind it like best.
//
// A panel's representatives are known once `following` more panels are full. They are kept in the
// page of the last of these, so that sequences which share a panel, and continue it otherwise, have
// their own. Sums of queries are made position by position, however a text was run.

#include <algorithm>

#include "engine/kv_cache.hpp"

namespace paceline {

void KVCache::reserve_sums(size_t nodes) {
    if (!sums_queries()) return;
    size_t size = 0;
    sums_at_.clear();
    for (const PageLayout::Layer& layer : layout_->layers) {
        sums_at_.push_back(size);
        size += nodes * layer.heads * layer.dim;
    }
    sums_.resize(size);
    sums_from_ = length_;
}

void KVCache::move_sums(size_t from, size_t to) {
    for (size_t layer = 0; layer < layout_->layers.size(); ++layer) {
        const PageLayout::Layer& at = layout_->layers[layer];
        std::copy_n(query_sum(layer, 0, from), at.heads * at.dim, query_sum(layer, 0, to));
    }
}

float* KVCache::panel_sum(size_t layer, size_t head, size_t panel) const {
    constexpr size_t kPanels = kCacheBlock / kPanel;
    const size_t dim = layout_->layers[layer].dim;
    const size_t before = layout_->few_read->summary_bytes(dim, layout_->rule);
    uint8_t* const page = pages_[panel / kPanels]->data + summaries(layer, head);
    return reinterpret_cast<float*>(page + before) + panel % kPanels * padded(dim);
}

float* KVCache::open_sum(size_t layer, size_t head, size_t position) const {
    constexpr size_t kPanels = kCacheBlock / kPanel;
    const size_t panel = position / kPanel / kPanels * kPanels;  // the first of the page
    const size_t stride = padded(layout_->layers[layer].dim);
    return panel_sum(layer, head, panel) + (kPanels + position % kPanel) * stride;
}

// Sums the queries of a panel that has become full, and finds the representatives of the one that
// it is the last to choose for.
void KVCache::represent(size_t layer, size_t head, size_t panel) {
    const size_t dim = layout_->layers[layer].dim, following = layout_->rule.following;
    float* const sum = panel_sum(layer, head, panel);
    std::fill_n(sum, dim, 0.0f);
    for (size_t position = panel * kPanel; position < (panel + 1) * kPanel; ++position) {
        const float* own = position < sums_from_ ? open_sum(layer, head, position)
                                                 : query_sum(layer, head, position - sums_from_);
        for (size_t d = 0; d < dim; ++d) sum[d] += own[d];
    }
    if (panel < following) return;
    const size_t of = panel - following, position = of * kPanel;
    float wanted[kLargestHead] = {};
    for (size_t behind = of + 1; behind <= panel; ++behind) {
        const float* own = panel_sum(layer, head, behind);
        for (size_t d = 0; d < dim; ++d) wanted[d] += own[d];
    }
    layout_->few_read->represent(
        block(layer, head, position), position % kCacheBlock / kPanel, dim, layout_->rule, wanted,
        panel % (kCacheBlock / kPanel), pages_[panel * kPanel / kCacheBlock]->data +
                                            summaries(layer, head));
}

// Moves the sums of committed nodes, of the panel that is not full, to its page.
void KVCache::keep_open_sums() {
    const size_t first = std::max(sums_from_, length_ / kPanel * kPanel);
    for (size_t layer = 0; layer < layout_->layers.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head)
            for (size_t position = first; position < length_; ++position)
                std::copy_n(query_sum(layer, head, position - sums_from_),
                            layout_->layers[layer].dim, open_sum(layer, head, position));
    sums_ = {};
}

}  // namespace paceline

#include "engine/prompt_clusters.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/kv_cache.hpp"

namespace paceline {

namespace {

constexpr size_t kCentroidsOfTop = 8;  // for each coarse cluster

size_t cluster_count(const FewRead& rule, size_t fixed) {
    const double count = std::ceil(rule.clusters * static_cast<double>(fixed));
    return std::clamp<size_t>(static_cast<size_t>(count), 1, fixed);
}

size_t top_count(const FewRead& rule, size_t count) {
    return rule.levels == 1 ? 0 : (count + kCentroidsOfTop - 1) / kCentroidsOfTop;
}

// Points in an even number of panels.
size_t in_pairs(size_t points) { return (points + 2 * kPanel - 1) / (2 * kPanel) * 2 * kPanel; }

// Takes the arrays of one head from `at` on; returns how many floats they need.
size_t divide(const FewRead& rule, size_t fixed, size_t dim, float* at, Clusters* own) {
    float* const begin = at;
    const auto take = [&](size_t floats) {
        float* start = at;
        at += padded(floats);
        return start;
    };
    own->fixed = fixed;
    own->count = cluster_count(rule, fixed);
    own->tops = top_count(rule, own->count);
    own->centroids = take(padded(own->count) * dim);
    own->top_centroids = take(padded(own->tops) * dim);
    for (int32_t** each : {&own->labels, &own->rows, &own->places})
        *each = reinterpret_cast<int32_t*>(take(fixed));
    own->starts = reinterpret_cast<int32_t*>(take(own->count + 1));
    own->parents = reinterpret_cast<int32_t*>(take(own->count));
    return static_cast<size_t>(at - begin);
}

}  // namespace

PromptClusters::PromptClusters(const PageLayout& layout, PagePool& memory, size_t fixed)
    : layout_(&layout), memory_(&memory), fixed_(fixed) {
    size_t floats = 0;
    Clusters none{};
    for (const PageLayout::Layer& layer : layout.layers)
        floats += layer.heads * divide(layout.rule, fixed, layer.dim, nullptr, &none);
    buffer_ = Buffer(floats * sizeof(float));
    float* at = buffer_.floats();
    const size_t pages = (fixed + kCacheBlock - 1) / kCacheBlock;
    pages_.reserve(pages);
    data_.reserve(pages);
    for (const PageLayout::Layer& layer : layout.layers) {
        std::vector<Clusters>& heads = heads_.emplace_back(layer.heads);
        for (Clusters& own : heads) {
            at += divide(layout.rule, fixed, layer.dim, at, &own);
            own.pages = data_.data();
        }
        made_.emplace_back(layer.heads, 0);
    }
    memory.check(pages);
    try {
        while (pages_.size() < pages) pages_.push_back(memory.take());
    } catch (...) {
        for (Page* page : pages_) memory.drop(page);
        throw;
    }
    for (const Page* page : pages_) data_.push_back(page->data);  // within what was reserved
}

PromptClusters::~PromptClusters() {
    for (Page* page : pages_) memory_->drop(page);
}

void PromptClusters::make(size_t layer, size_t head, const std::vector<Page*>& from) {
    const PageLayout::Layer& at = layout_->layers[layer];
    const FewReadKernels& kernels = *layout_->few_read;
    Clusters& own = heads_[layer][head];
    const auto points = [&](size_t size) {
        Buffer values(in_pairs(size) * at.dim * sizeof(float));
        values.zero();
        return values;
    };
    const auto cluster = [&](const Buffer& values, size_t size, size_t count, int32_t* labels,
                             float* means) {
        const Points given{values.floats(), size, at.dim};
        const Buffer scratch(kernels.cluster_bytes(given, count));
        kernels.cluster(given, count, labels, means, scratch.bytes());
    };
    const Buffer keys = points(fixed_);
    const size_t offset = at.offset + head * at.block;
    for (size_t panel = 0; panel < fixed_ / kPanel; ++panel)
        kernels.read_keys(from[panel * kPanel / kCacheBlock]->data + offset,
                          panel % (kCacheBlock / kPanel), at.dim,
                          keys.floats() + panel * kPanel * at.dim);
    cluster(keys, fixed_, own.count, own.labels, own.centroids);
    std::fill_n(own.parents, own.count, 0);
    if (own.tops) {
        const Buffer means = points(own.count);
        std::copy_n(own.centroids, padded(own.count) * at.dim, means.floats());
        cluster(means, own.count, own.tops, own.parents, own.top_centroids);
    }
    set_order(own, at.dim);
    copy_rows(layer, head, from);
    made_[layer][head] = 1;
}

// Orders clusters by coarse ones, and rows by clusters.
void PromptClusters::set_order(Clusters& own, size_t dim) {
    std::vector<int32_t> order(own.count), place(own.count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t one, int32_t other) {
        return own.parents[one] < own.parents[other];
    });
    const std::vector<int32_t> parents(own.parents, own.parents + own.count);
    const std::vector<float> means(own.centroids, own.centroids + padded(own.count) * dim);
    for (size_t to = 0; to < own.count; ++to) {
        const auto from = static_cast<size_t>(order[to]);
        place[from] = static_cast<int32_t>(to);
        own.parents[to] = parents[from];
        for (size_t d = 0; d < dim; ++d)
            own.centroids[(to / kPanel * dim + d) * kPanel + to % kPanel] =
                means[(from / kPanel * dim + d) * kPanel + from % kPanel];
    }
    std::fill_n(own.starts, own.count + 1, 0);
    for (size_t position = 0; position < own.fixed; ++position) {
        own.labels[position] = place[static_cast<size_t>(own.labels[position])];
        ++own.starts[own.labels[position] + 1];
    }
    std::partial_sum(own.starts, own.starts + own.count + 1, own.starts);
    std::vector<int32_t> next(own.starts, own.starts + own.count);
    for (size_t position = 0; position < own.fixed; ++position) {
        const int32_t row = next[static_cast<size_t>(own.labels[position])]++;
        own.rows[position] = row;
        own.places[row] = static_cast<int32_t>(position);
    }
}

void PromptClusters::copy_rows(size_t layer, size_t head, const std::vector<Page*>& from) {
    const PageLayout::Layer& at = layout_->layers[layer];
    const Clusters& own = heads_[layer][head];
    const size_t offset = at.offset + head * at.block;
    for (size_t row = 0; row < fixed_; ++row) {
        const auto position = static_cast<size_t>(own.places[row]);
        layout_->kernels->copy(from[position / kCacheBlock]->data + offset, position % kCacheBlock,
                               pages_[row / kCacheBlock]->data + offset, row % kCacheBlock, 1,
                               at.dim);
    }
}

}  // namespace paceline

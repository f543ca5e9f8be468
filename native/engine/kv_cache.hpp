// Keys and values of one sequence, in pages of 64 rows: a page is [layer][head][block].
//
// The kernels know what a block looks like. A row is the key and value of one position in one head;
// every committed position has one until `evict` drops some. Nodes that are not committed yet lie
// behind the committed rows of their layer, in the order of their tree. Forks share pages; a page
// that others hold, too, is copied before it is written.
//
// A cache in groups rounds 32 positions together once they are committed. The rows of the open
// group lie in up to two pages more, sixteen to a page; those of nodes in a buffer, until `commit`.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/page_pool.hpp"
#include "engine/prompt_clusters.hpp"
#include "engine/shape.hpp"
#include "kernels/few_read.hpp"
#include "kernels/packed.hpp"

namespace paceline {

// Where the layers lie in a page.
struct PageLayout {
    // Without `few_read` keys have no summaries.
    PageLayout(const Shape& shape, const CacheKernels& kernels, const PackedKernels* packed,
               const FewReadKernels* few_read, const FewRead& rule);

    const CacheKernels* kernels;
    const PackedKernels* packed;  // of a cache in groups, or null
    const FewReadKernels* few_read;
    FewRead rule;  // how keys are summarised
    struct Layer {
        size_t heads, dim, block, offset;  // bytes of one head's block, and of the layers before
        size_t summary, summaries;         // bytes of those of one head's block, and where they are
    };
    std::vector<Layer> layers;
    size_t bytes = 0;
};

// Rows of one head to keep, as increasing indices.
struct KeptRows {
    const int32_t* rows;
    size_t count;
};
using KeptLayers = std::vector<std::vector<KeptRows>>;  // [layer][head]

// New rows of one layer: keys, rotated, and values, [head][count][dim].
struct NewRows {
    const float *keys, *values;
};

class KVCache {
public:
    KVCache(const PageLayout& layout, PagePool& memory) : layout_(&layout), memory_(&memory) {}
    KVCache(KVCache&&) = default;
    ~KVCache() { keep(0), close_open(), drop_spare(), keep_query_pages(0); }

    // Positions committed so far, evicted ones too.
    size_t length() const { return length_; }
    // Committed rows of a head, of the head of a layer with most, and of the layer with most.
    size_t held(size_t layer, size_t head) const {
        return positions_.empty() ? length_ : positions_[layer][head].size();
    }
    size_t held(size_t layer) const;
    size_t row_count() const;
    // Whether some position has no row.
    bool evicted() const { return !positions_.empty(); }
    // Positions of a head's rows; null where row i is position i.
    const int32_t* positions(size_t layer, size_t head) const {
        static constexpr int32_t kNone = 0;  // a vector without rows may have no address
        if (positions_.empty()) return nullptr;
        return positions_[layer][head].empty() ? &kNone : positions_[layer][head].data();
    }
    size_t bytes() const { return all_pages().size() * layout_->bytes; }
    // Those of the open group and of clusters first.
    std::vector<Page*> all_pages() const;

    // Whether positions are rounded in groups of kCacheGroup.
    bool grouped() const { return layout_->packed; }
    // Where the open group begins: positions before it are rounded.
    size_t open_from() const { return length_ / kCacheGroup * kCacheGroup; }
    // The largest length, at most `length`, that `truncate` can cut to. Rows that were rounded, and
    // queries that were summed, do not come back.
    size_t cut_point(size_t length) const {
        const size_t group = grouped() ? kCacheGroup : sums_queries() ? kPanel : 1;
        return length >= length_ / group * group ? length : length / group * group;
    }
    // Pages of the rows that are not rounded: two of the open group, then those of nodes.
    const uint8_t* const* open() const { return grouped() ? open_data_.data() : nullptr; }
    // Rounds a group of 32 rows of `open`, for one head, into a block.
    void close(size_t layer, size_t head, const int32_t* slots, uint8_t* block, size_t half) const {
        layout_->packed->close({open_data_.data(), offset(layer, head), slots, block, half},
                                        layout_->layers[layer].dim);
    }
    // Rounds the group of a chain that begins at `position`, where it will lie.
    void close_chain(size_t layer, size_t head, size_t position) const;
    // One committed row, as the kernels see it.
    void read_row(size_t layer, size_t head, size_t row, float* key, float* value) const;

    // Pages that `nodes` behind the committed positions want besides those that are there.
    size_t missing(size_t nodes) const;
    // Pages that others hold, too, and that must be copied before nodes are written.
    std::vector<Page*> copied_first() const;
    // Room for `nodes` behind the committed positions. Forgets earlier nodes.
    void prepare(size_t nodes);
    // Remembers the tree that the nodes belong to, for `commit`; that of a view is refused there.
    void remember(const int32_t* parents, size_t nodes, bool viewed) {
        parents_.assign(parents, parents + nodes);
        viewed_ = viewed;
    }
    // Keeps the nodes of `path`, root first. Throws std::invalid_argument if it is not a path.
    void commit(const int32_t* path, size_t count);
    // Throws std::invalid_argument if `length` is more than there is, or lies before the last
    // eviction, or attention is tracked, or is no cut point; 0 is always possible.
    void truncate(size_t length);
    // Drops all rows but these, of each head, which must be valid indices. Forgets the nodes.
    // Throws MemoryFull or std::bad_alloc; then nothing has been done. Refused in groups.
    void evict(const KeptLayers& kept);
    // Summarises panels of 16 rows, first .. last - 1, of one head, where keys have summaries.
    void summarise(size_t layer, size_t head, size_t first, size_t last);
    size_t summaries(size_t layer, size_t head) const {
        const PageLayout::Layer& at = layout_->layers[layer];
        return at.summaries + head * at.summary;
    }
    // Whether the queries of a panel choose what represents panels before it.
    bool sums_queries() const { return layout_->few_read && layout_->rule.following; }
    // Room for the queries of nodes, summed over the query heads of each kv head, and one of them.
    void reserve_sums(size_t nodes);
    float* query_sum(size_t layer, size_t head, size_t node) {
        const PageLayout::Layer& at = layout_->layers[layer];
        return sums_.data() + sums_at_[layer] + (node * at.heads + head) * at.dim;
    }
    // Positions of the prompt whose keys are clustered; 0: none.
    size_t clustered() const;
    // Pages that `prepare_clusters` takes.
    size_t missing_clusters() const;
    // Room for clusters of the prompt, where there are none yet, or those of other keys.
    void prepare_clusters();
    // Null where there are none.
    PromptClusters* clusters() const { return clusters_.get(); }
    void make_clusters(size_t layer, size_t head) { clusters_->make(layer, head, pages_); }
    // Positions below it are those of a prompt, which read everything.
    size_t prompt() const { return prompt_; }
    void set_prompt(size_t length) { prompt_ = length; }
    // Shares every page of keys and values; takes pages for a copy of tracked queries only.
    KVCache fork() const;
    // Copies a page whose positions are all committed; `append_page` takes what it gives. Both throw
    // std::invalid_argument where rows were evicted or attention is tracked. To append needs whole
    // pages before, forgets the nodes, and throws MemoryFull.
    void read_page(size_t page, uint8_t* to) const;
    void append_page(const uint8_t* from);
    // Commits `count` positions by the rows of each layer. Forgets the nodes. Throws
    // std::invalid_argument where rows were evicted, or attention or queries are tracked, and
    // MemoryFull; then nothing has been done.
    void append_rows(std::span<const NewRows> rows, size_t count);

    // Keeps the attention that each row receives. Throws std::invalid_argument unless empty.
    void track_attention();
    bool tracks_attention() const { return !mass_.empty(); }
    // Of each row of a head, as `held`, while attention is tracked.
    std::vector<double>& mass(size_t layer, size_t head) { return mass_[layer][head]; }
    // Keeps the queries of the last `window` positions, of at most `size` floats in a layer, in
    // pages of their own. Throws std::invalid_argument unless empty.
    void track_queries(size_t window, size_t size);
    // Pages that the queries of the last positions take when `length` are committed.
    size_t query_pages(size_t length) const;
    bool tracks_queries() const { return query_window_ > 0; }
    size_t query_window() const { return query_window_; }
    bool keeps_queries() const { return tracks_attention() || tracks_queries(); }
    // Queries of the last positions, at most the window, [position][size], in order.
    std::vector<float> recent_queries(size_t layer, size_t size) const;
    // Queries of the nodes [node][size], while attention or queries are tracked; after `commit`
    // those of the path. `reserve_queries` is called by the pass that will fill them.
    void reserve_queries(size_t layer, size_t nodes, size_t size);
    float* queries(size_t layer) { return queries_[layer].values.data(); }
    // Moves the queries of the last `count` positions to the recent ones, where they are tracked.
    void keep_queries(size_t count);
    void drop_queries();

    // Bytes of one head's block, and of all heads' blocks for the same positions.
    size_t block_bytes(size_t layer) const { return layout_->layers[layer].block; }
    size_t stride(size_t layer) const { return block_bytes(layer) * layout_->layers[layer].heads; }
    // Where pages begin, and where in a page the block of a head does.
    const uint8_t* const* data() const { return data_.data(); }
    size_t offset(size_t layer, size_t head) const {
        return layout_->layers[layer].offset + head * block_bytes(layer);
    }
    // The row of a node, behind the committed ones.
    void put(size_t layer, size_t head, size_t node, const float* key, const float* value) {
        const size_t row = held(layer, head) + node, dim = layout_->layers[layer].dim;
        if (grouped())
            return layout_->kernels->put(open_row(layer, head, kCacheGroup + node), node % kPanel,
                                         dim, key, value);
        layout_->kernels->put(block(layer, head, row), row % kCacheBlock, dim, key, value);
    }
    // Copies `count` positions of one panel to places of one panel, from `to` on, of another block.
    void copy(size_t layer, size_t head, size_t position, uint8_t* block, size_t to,
              size_t count = 1) const {
        layout_->kernels->copy(this->block(layer, head, position), position % kCacheBlock, block,
                               to, count, layout_->layers[layer].dim);
    }

private:
    uint8_t* block(size_t layer, size_t head, size_t position) const {
        return pages_[position / kCacheBlock]->data + offset(layer, head);
    }
    struct Queries {
        std::vector<float> values;
        size_t size = 0;  // of each node
    };

    void check_whole() const;
    void check_ungrouped() const;
    size_t open_wanted(size_t nodes) const;
    size_t spare_wanted(size_t nodes) const;
    void prepare_open(size_t nodes);
    void commit_groups(const int32_t* path, size_t count);
    void show_open();
    void close_open();
    void drop_spare();
    uint8_t* open_row(size_t layer, size_t head, size_t slot) const {
        return const_cast<uint8_t*>(open_data_[slot / kPanel]) + offset(layer, head);
    }
    void add(Page* page);
    void keep(size_t pages);
    void replace(size_t page, Page* by);
    void move(size_t from, size_t to);
    void summarise_from(size_t length);
    void move_sums(size_t from, size_t to);
    void represent(size_t layer, size_t head, size_t panel);
    void keep_open_sums();
    // Where sums of queries are kept behind the summaries of a page: of each panel, then of the
    // positions of the panel that is not full.
    float* panel_sum(size_t layer, size_t head, size_t panel) const;
    float* open_sum(size_t layer, size_t head, size_t position) const;
    bool stays(const KeptLayers& kept, size_t page) const;
    void gather(const KeptLayers& kept, size_t page, uint8_t* to) const;
    void keep_query_pages(size_t pages);
    size_t queries_per_page() const {
        return layout_->bytes / (query_floats_ * sizeof(float));
    }
    // Where the query of a position in a layer is kept.
    float* recent(size_t position, size_t layer) const {
        const size_t place = position % query_window_ * layout_->layers.size() + layer;
        return (float*)query_pages_[place / queries_per_page()]->data +
               place % queries_per_page() * query_floats_;
    }

    const PageLayout* layout_;
    PagePool* memory_;
    std::vector<Page*> pages_;
    std::vector<const uint8_t*> data_;  // of the pages
    std::vector<Page*> open_, spare_;   // rows of the open group, and room for those of the next
    std::vector<const uint8_t*> open_data_;  // see `open`
    Buffer nodes_;                           // rows of nodes of a cache in groups
    std::vector<int32_t> parents_;  // of the last tree; empty when there is nothing to commit
    bool viewed_ = false;           // that tree saw a part of the model only
    size_t length_ = 0, prompt_ = 0;
    std::vector<std::vector<std::vector<int32_t>>> positions_;  // [layer][head][row]; see `evicted`
    size_t evicted_at_ = 0;                                     // length at the last eviction
    std::vector<std::vector<std::vector<double>>> mass_;        // [layer][head][row]
    std::vector<Queries> queries_;                              // [layer]
    size_t query_window_ = 0;                                   // 0: queries are not tracked
    size_t query_floats_ = 0;                                   // room for those of a layer
    std::vector<Page*> query_pages_;  // [position % window][layer][query_floats_]
    std::shared_ptr<PromptClusters> clusters_;
    std::vector<float> sums_;           // of the nodes: [layer][node][head][dim]
    std::vector<size_t> sums_at_;       // where each layer begins in them
    size_t sums_from_ = 0;              // position of the first node
};

}  // namespace paceline

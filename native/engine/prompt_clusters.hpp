// Keys of a prompt in clusters, of all layers and heads, and a copy of its rows cluster by cluster.
//
// They are made in the first pass over a token behind the prompt; sequences that are forked later
// share them.
#pragma once

#include <vector>

#include "engine/page_pool.hpp"
#include "kernels/few_read.hpp"

namespace paceline {

struct PageLayout;

class PromptClusters {
public:
    // For the first `fixed` positions, whole panels. Takes pages; throws MemoryFull, std::bad_alloc.
    PromptClusters(const PageLayout& layout, PagePool& memory, size_t fixed);
    PromptClusters(const PromptClusters&) = delete;
    ~PromptClusters();

    size_t fixed() const { return fixed_; }
    const std::vector<Page*>& pages() const { return pages_; }
    const Clusters& of(size_t layer, size_t head) const { return heads_[layer][head]; }
    bool made(size_t layer, size_t head) const { return made_[layer][head] != 0; }
    // Of rows in these pages.
    void make(size_t layer, size_t head, const std::vector<Page*>& from);

private:
    void set_order(Clusters& own, size_t dim);
    void copy_rows(size_t layer, size_t head, const std::vector<Page*>& from);

    const PageLayout* layout_;
    PagePool* memory_;
    size_t fixed_;
    Buffer buffer_;  // of all arrays of `heads_`
    std::vector<Page*> pages_;
    std::vector<const uint8_t*> data_;
    std::vector<std::vector<Clusters>> heads_;  // [layer][head]
    std::vector<std::vector<uint8_t>> made_;    // [layer][head]
};

}  // namespace paceline

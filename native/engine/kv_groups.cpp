// What a cache does whose positions are rounded in groups.

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>

#include "engine/kv_cache.hpp"

namespace paceline {

namespace {

constexpr size_t kOpenPages = kCacheGroup / kPanel;
constexpr size_t kKeptNodes = 64;  // rows of as many nodes are kept from pass to pass

size_t open_pages(size_t rows) { return (std::min(rows, kCacheGroup) + kPanel - 1) / kPanel; }

}  // namespace

std::vector<Page*> KVCache::all_pages() const {
    std::vector<Page*> pages = spare_;
    if (clusters_) pages = clusters_->pages();
    pages.insert(pages.end(), open_.begin(), open_.end());
    pages.insert(pages.end(), pages_.begin(), pages_.end());
    return pages;
}

void KVCache::check_ungrouped() const {
    if (grouped())
        throw std::invalid_argument("keys and values are rounded in groups of positions, which "
                                    "no row can leave");
}

// Pages that the open group lacks for `nodes` more, and those of the group behind it.
size_t KVCache::open_wanted(size_t nodes) const {
    return open_pages(length_ - open_from() + nodes) - std::min(open_.size(),
           open_pages(length_ - open_from() + nodes));
}

size_t KVCache::spare_wanted(size_t nodes) const {
    const size_t rows = length_ - open_from() + nodes;
    const size_t wanted = rows > kCacheGroup ? open_pages(rows - kCacheGroup) : 0;
    return wanted > spare_.size() ? wanted - spare_.size() : 0;
}

void KVCache::prepare_open(size_t nodes) {
    for (size_t more = open_wanted(nodes); more > 0; --more) open_.push_back(memory_->take());
    for (size_t more = spare_wanted(nodes); more > 0; --more) spare_.push_back(memory_->take());
    nodes_.reserve((nodes + kPanel - 1) / kPanel * layout_->bytes);
    show_open();
    for (size_t node = 0; node < nodes; node += kPanel)
        open_data_.push_back(nodes_.bytes() + node / kPanel * layout_->bytes);
}

void KVCache::show_open() {
    open_data_.assign(kOpenPages, nullptr);
    for (size_t page = 0; page < open_.size(); ++page) open_data_[page] = open_[page]->data;
}

void KVCache::close_open() {
    for (Page* page : open_) memory_->drop(page);
    open_.clear();
}

void KVCache::drop_spare() {
    for (Page* page : spare_) memory_->drop(page);
    spare_.clear();
}

void KVCache::close_chain(size_t layer, size_t head, size_t position) const {
    std::array<int32_t, kCacheGroup> slots;
    for (size_t i = 0; i < kCacheGroup; ++i) {
        const size_t at = position + i;
        slots[i] = static_cast<int32_t>(at < length_ ? at - open_from()
                                                     : kCacheGroup + at - length_);
    }
    close(layer, head, slots.data(), block(layer, head, position),
          position % kCacheBlock / kCacheGroup);
}

// The groups of a chain were rounded in its pass. Others are now: behind what a fork reads.
void KVCache::commit_groups(const int32_t* path, size_t count) {
    const size_t end = length_ + count, from = open_from();
    const size_t open_at = end / kCacheGroup * kCacheGroup;
    const auto slot = [&](size_t position) {
        return position < length_ ? static_cast<int32_t>(position - from)
                                  : static_cast<int32_t>(kCacheGroup) + path[position - length_];
    };
    bool chain = true;
    for (size_t i = 0; i < parents_.size(); ++i)
        chain = chain && parents_[i] == static_cast<int32_t>(i) - 1;
    const auto each_head = [&](const auto& use) {
        for (size_t layer = 0; layer < layout_->layers.size(); ++layer)
            for (size_t head = 0; head < layout_->layers[layer].heads; ++head) use(layer, head);
    };
    for (size_t group = from; group < open_at && !chain; group += kCacheGroup) {
        std::array<int32_t, kCacheGroup> slots;
        for (size_t i = 0; i < kCacheGroup; ++i) slots[i] = slot(group + i);
        each_head([&](size_t layer, size_t head) {
            close(layer, head, slots.data(), block(layer, head, group),
                  group % kCacheBlock / kCacheGroup);
        });
    }
    std::vector<Page*>& rows = open_at > from ? spare_ : open_;
    for (size_t at = std::max(length_, open_at); at < end; ++at) {
        const auto source = static_cast<size_t>(slot(at));
        const size_t place = (at - open_at) % kPanel;
        each_head([&](size_t layer, size_t head) {
            layout_->kernels->copy(open_row(layer, head, source), source % kPanel,
                                   rows[(at - open_at) / kPanel]->data + offset(layer, head), place,
                                   1, layout_->layers[layer].dim);
        });
    }
    if (open_at > from) std::swap(open_, spare_);
    drop_spare();
    length_ = end;
    parents_.clear();
    for (const size_t wanted = open_pages(end - open_at); open_.size() > wanted; open_.pop_back())
        memory_->drop(open_.back());
    if (nodes_.size() > kKeptNodes / kPanel * 2 * layout_->bytes) nodes_ = Buffer();
    show_open();
    keep((length_ + kCacheBlock - 1) / kCacheBlock);
}

void KVCache::read_row(size_t layer, size_t head, size_t row, float* key, float* value) const {
    const size_t dim = layout_->layers[layer].dim;
    const PackedKernels& kernels = *layout_->packed;
    if (row < open_from())
        return kernels.read_closed(block(layer, head, row), row % kCacheBlock, dim, key, value);
    const size_t slot = row - open_from();
    kernels.read_open(open_row(layer, head, slot), slot % kPanel, dim, key, value);
}

}  // namespace paceline

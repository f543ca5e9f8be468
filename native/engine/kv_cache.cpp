#include "engine/kv_cache.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace paceline {

namespace {

size_t pages_for(size_t positions) { return (positions + kCacheBlock - 1) / kCacheBlock; }

// Pages of rows that are not rounded, of a sequence of `length` positions.
size_t pages_in_group(size_t length) { return (length % kCacheGroup + kPanel - 1) / kPanel; }

}  // namespace

PageLayout::PageLayout(const Shape& shape, const CacheKernels& given, const PackedKernels* groups,
                       const FewReadKernels* few_read, const FewRead& rule)
    : kernels(&given), packed(groups), few_read(few_read), rule(rule) {
    for (const LayerShape& layer : shape.layers) {
        const size_t block = given.block_bytes(layer.head_dim);
        size_t own = few_read ? few_read->summary_bytes(layer.head_dim, rule) : 0;
        if (few_read && rule.following)  // sums of queries, see `represent`
            own += (kCacheBlock / kPanel + kPanel) * padded(layer.head_dim) * sizeof(float);
        const size_t end = bytes + layer.kv_heads * block;
        layers.push_back({layer.kv_heads, layer.head_dim, block, bytes, own, end});
        bytes = end + layer.kv_heads * own;
    }
}

size_t KVCache::held(size_t layer) const {
    if (positions_.empty()) return length_;
    size_t rows = 0;
    for (const std::vector<int32_t>& head : positions_[layer]) rows = std::max(rows, head.size());
    return rows;
}

size_t KVCache::row_count() const {
    if (positions_.empty()) return length_;
    size_t rows = 0;
    for (size_t layer = 0; layer < positions_.size(); ++layer) rows = std::max(rows, held(layer));
    return rows;
}

// Nodes are written from the page on where the head with fewest rows ends.
std::vector<Page*> KVCache::copied_first() const {
    std::vector<Page*> shared;
    size_t fewest = grouped() ? open_from() : length_;
    for (const auto& layer : positions_)
        for (const std::vector<int32_t>& head : layer) fewest = std::min(fewest, head.size());
    for (size_t page = fewest / kCacheBlock; page < pages_for(row_count()); ++page)
        if (memory_->holders(pages_[page]) > 1) shared.push_back(pages_[page]);
    for (size_t page = (length_ - open_from()) / kPanel; grouped() && page < open_.size(); ++page)
        if (memory_->holders(open_[page]) > 1) shared.push_back(open_[page]);
    return shared;
}

size_t KVCache::missing(size_t nodes) const {
    const size_t wanted = pages_for(row_count() + nodes), there = pages_.size();
    const size_t queries = query_pages(length_ + nodes), kept = query_pages_.size();
    const size_t more = (wanted > there ? wanted - there : 0) +
                        (queries > kept ? queries - kept : 0);
    return grouped() ? more + open_wanted(nodes) + spare_wanted(nodes) : more;
}

void KVCache::prepare(size_t nodes) {
    parents_.clear();
    // Clusters of keys that were not committed then.
    if (clusters_ && clusters_->fixed() > length_) clusters_.reset();
    for (Page* shared : copied_first()) {
        Page* own = memory_->take();
        std::memcpy(own->data, shared->data, layout_->bytes);
        const auto found = std::ranges::find(open_, shared);
        if (found == open_.end()) {
            replace(static_cast<size_t>(std::ranges::find(pages_, shared) - pages_.begin()), own);
        } else {
            memory_->drop(*found);
            *found = own;
        }
    }
    while (pages_.size() < pages_for(row_count() + nodes)) add(memory_->take());
    if (grouped()) prepare_open(nodes);
    query_pages_.reserve(query_pages(length_ + nodes));
    while (query_pages_.size() < query_pages(length_ + nodes))
        query_pages_.push_back(memory_->take());
}

void KVCache::add(Page* page) {
    pages_.push_back(page);
    data_.push_back(page->data);
}

void KVCache::replace(size_t page, Page* by) {
    memory_->drop(pages_[page]);
    pages_[page] = by;
    data_[page] = by->data;
}

// Gives the pages behind the first `count` back.
void KVCache::keep(size_t count) {
    for (; pages_.size() > count; pages_.pop_back(), data_.pop_back()) memory_->drop(pages_.back());
}

KVCache KVCache::fork() const {
    KVCache other(*layout_, *memory_);
    const size_t count = pages_for(row_count());
    other.length_ = length_;
    other.prompt_ = prompt_;
    other.positions_ = positions_;
    other.evicted_at_ = evicted_at_;
    for (size_t i = 0; i < pages_in_group(length_); ++i) {
        if (!grouped()) break;
        memory_->hold(open_[i]);
        other.open_.push_back(open_[i]);
    }
    if (grouped()) other.show_open();
    other.mass_ = mass_;
    other.queries_.resize(queries_.size());
    other.query_window_ = query_window_;
    other.query_floats_ = query_floats_;
    other.clusters_ = clusters_;
    for (size_t page = 0; page < query_pages(length_); ++page) {
        other.query_pages_.reserve(query_pages(length_));
        other.query_pages_.push_back(memory_->take());
        std::memcpy(other.query_pages_[page]->data, query_pages_[page]->data, layout_->bytes);
    }
    other.pages_.reserve(count);
    other.data_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
        memory_->hold(pages_[i]);
        other.add(pages_[i]);
    }
    return other;
}

// Copies the row of node `from` to that of node `to`, in every layer.
void KVCache::move(size_t from, size_t to) {
    for (size_t layer = 0; layer < layout_->layers.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head) {
            const size_t first = held(layer, head), at = first + to;
            copy(layer, head, first + from, block(layer, head, at), at % kCacheBlock);
        }
    if (sums_queries()) move_sums(from, to);
    for (Queries& queries : queries_) {
        if (queries.values.empty()) continue;
        const auto first = queries.values.begin();
        std::copy_n(first + static_cast<ptrdiff_t>(from * queries.size), queries.size,
                    first + static_cast<ptrdiff_t>(to * queries.size));
    }
}

// Writes behind the committed positions only: a fork that was made since the pass, and so shares
// the page, does not read there and copies it before it writes.
void KVCache::commit(const int32_t* path, size_t count) {
    if (parents_.empty()) throw std::invalid_argument("there is no forward pass to commit");
    if (viewed_) throw std::invalid_argument("the last forward pass was a view, to draft only");
    for (size_t i = 0; i < count; ++i) {
        const bool inside = path[i] >= 0 && static_cast<size_t>(path[i]) < parents_.size();
        if (!inside || parents_[path[i]] != (i ? path[i - 1] : -1))
            throw std::invalid_argument("node " + std::to_string(path[i]) + " at place " +
                                        std::to_string(i) + " does not continue the path");
    }
    if (grouped()) {
        commit_groups(path, count);
        return;
    }
    for (size_t i = 0; i < count; ++i)
        if (static_cast<size_t>(path[i]) != i) move(static_cast<size_t>(path[i]), i);
    for (auto& layer : positions_)
        for (auto& head : layer) {
            head.resize(head.size() + count);
            std::iota(head.end() - static_cast<ptrdiff_t>(count), head.end(),
                      static_cast<int32_t>(length_));
        }
    for (auto& layer : mass_)
        for (auto& head : layer) head.resize(head.size() + count);
    length_ += count;
    parents_.clear();
    keep(pages_for(row_count()));
    summarise_from(length_ - count);
}

size_t KVCache::clustered() const {
    const bool some = layout_->few_read && layout_->rule.summary == Summary::centroids;
    return some ? prompt_ / kPanel * kPanel : 0;
}

size_t KVCache::missing_clusters() const {
    const size_t fixed = clustered();
    const bool there = clusters_ && clusters_->fixed() == fixed && fixed <= length_;
    return there ? 0 : pages_for(fixed);
}

void KVCache::prepare_clusters() {
    if (!missing_clusters()) return;
    clusters_.reset();
    clusters_ = std::make_shared<PromptClusters>(*layout_, *memory_, clustered());
}

void KVCache::summarise(size_t layer, size_t head, size_t first, size_t last) {
    const PageLayout::Layer& at = layout_->layers[layer];
    for (size_t panel = first; at.summary && panel < last; ++panel) {
        const size_t position = panel * kPanel;
        if (sums_queries()) {
            represent(layer, head, panel);
            continue;
        }
        layout_->few_read->summarise(block(layer, head, position),
                                     position % kCacheBlock / kPanel, at.dim,
                                     layout_->rule.summary,
                                     pages_[position / kCacheBlock]->data + summaries(layer, head));
    }
}

// Panels that were filled since there were `length` positions.
void KVCache::summarise_from(size_t length) {
    for (size_t layer = 0; layer < layout_->layers.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head)
            summarise(layer, head, length / kPanel, length_ / kPanel);
    if (sums_queries()) keep_open_sums();
}

void KVCache::truncate(size_t length) {
    if (length > length_)
        throw std::invalid_argument("cannot truncate " + std::to_string(length_) +
                                    " positions to " + std::to_string(length));
    if (length && length < evicted_at_)
        throw std::invalid_argument("rows were evicted at " + std::to_string(evicted_at_));
    if (length && length < length_ && tracks_attention())
        throw std::invalid_argument("the attention of later positions was summed");
    if (length && length < length_ && query_window_)
        throw std::invalid_argument("queries of earlier positions were dropped");
    if (cut_point(length) < length)
        throw std::invalid_argument(
            grouped() ? "positions before " + std::to_string(open_from()) +
                            " were rounded in groups of " + std::to_string(kCacheGroup)
                      : "queries were summed in runs of " + std::to_string(kPanel) +
                            ", so that this text can be cut to " +
                            std::to_string(cut_point(length)));
    if (grouped()) {
        drop_spare();
        if (length < open_from()) close_open();
        for (; open_.size() > pages_in_group(length); open_.pop_back()) memory_->drop(open_.back());
        show_open();
    }
    if (!length) {
        positions_.clear();
        keep_query_pages(0);
        evicted_at_ = 0;
        for (auto& layer : mass_)
            for (auto& head : layer) head.clear();
    }
    for (auto& layer : positions_)  // everything behind the last eviction is held
        for (auto& head : layer) head.resize(head.size() - (length_ - length));
    length_ = length;
    if (clusters_ && clusters_->fixed() > length) clusters_.reset();
    parents_.clear();
    keep(pages_for(row_count()));
}

// Whether the rows that a page is to hold are there already.
bool KVCache::stays(const KeptLayers& kept, size_t page) const {
    for (const auto& layer : kept)
        for (const auto& [rows, count] : layer) {
            const size_t end = std::min(count, (page + 1) * kCacheBlock);
            for (size_t row = page * kCacheBlock; row < end; ++row)
                if (static_cast<size_t>(rows[row]) != row) return false;
        }
    return true;
}

// Copies the rows that a page is to hold to `to`, which may be that page: no row lies before the
// place where it goes.
void KVCache::gather(const KeptLayers& kept, size_t page, uint8_t* to) const {
    for (size_t layer = 0; layer < kept.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head) {
            const auto& [rows, count] = kept[layer][head];
            const size_t end = std::min(count, (page + 1) * kCacheBlock);
            for (size_t row = page * kCacheBlock, run; row < end; row += run) {
                const auto from = static_cast<size_t>(rows[row]);
                const bool overlap =
                    pages_[page]->data == to && from / kPanel == row / kPanel;
                const size_t most =
                    overlap ? 1 : kPanel - std::max(row % kPanel, from % kPanel);
                for (run = 1; run < most && row + run < end; ++run)
                    if (static_cast<size_t>(rows[row + run]) != from + run) break;
                if (from == row && pages_[page]->data == to) continue;
                copy(layer, head, from, to + offset(layer, head), row % kCacheBlock, run);
            }
        }
}

void KVCache::evict(const KeptLayers& kept) {
    check_ungrouped();
    size_t most = 0;
    for (const auto& layer : kept)
        for (const KeptRows& rows : layer) most = std::max(most, rows.count);
    std::vector<size_t> changed, copied;
    for (size_t page = 0; page < pages_for(most); ++page) {
        if (stays(kept, page)) continue;
        changed.push_back(page);
        if (memory_->holders(pages_[page]) > 1) copied.push_back(page);
    }
    memory_->check(copied.size());
    std::vector<Page*> fresh;
    try {
        fresh.reserve(copied.size());
        while (fresh.size() < copied.size()) fresh.push_back(memory_->take());
    } catch (...) {
        for (Page* page : fresh) memory_->drop(page);
        throw;
    }
    parents_.clear();
    auto next = fresh.begin();
    for (const size_t page : changed) {
        const bool shared = memory_->holders(pages_[page]) > 1;
        gather(kept, page, shared ? (*next)->data : pages_[page]->data);
        if (shared) replace(page, *next++);
    }
    for (size_t unused = static_cast<size_t>(fresh.end() - next); unused > 0; --unused)
        memory_->drop(*next++);  // another holder left meanwhile
    std::vector<std::vector<std::vector<int32_t>>> positions(kept.size());
    for (size_t layer = 0; layer < kept.size(); ++layer)
        for (size_t head = 0; head < layout_->layers[layer].heads; ++head) {
            const auto& [rows, count] = kept[layer][head];
            std::vector<int32_t>& own = positions[layer].emplace_back();
            std::vector<double> mass;
            for (size_t row = 0; row < count; ++row) {
                own.push_back(positions_.empty() ? rows[row] : positions_[layer][head][rows[row]]);
                if (tracks_attention()) mass.push_back(mass_[layer][head][rows[row]]);
            }
            if (tracks_attention()) mass_[layer][head] = std::move(mass);
        }
    positions_ = std::move(positions);
    evicted_at_ = length_;
    keep(pages_for(most));
}

void KVCache::check_whole() const {
    if (evicted()) throw std::invalid_argument("rows of this sequence were evicted");
    if (tracks_attention()) throw std::invalid_argument("this sequence tracks attention");
    if (query_window_) throw std::invalid_argument("this sequence tracks queries");
}

void KVCache::read_page(size_t page, uint8_t* to) const {
    check_whole();
    if (page >= length_ / kCacheBlock)
        throw std::invalid_argument("page " + std::to_string(page) + " is not among the " +
                                    std::to_string(length_ / kCacheBlock) + " full pages");
    std::memcpy(to, pages_[page]->data, layout_->bytes);
}

void KVCache::append_page(const uint8_t* from) {
    check_whole();
    if (length_ % kCacheBlock)
        throw std::invalid_argument("a page cannot follow " + std::to_string(length_) +
                                    " positions, expected a multiple of " +
                                    std::to_string(kCacheBlock));
    parents_.clear();
    close_open();
    drop_spare();
    keep(length_ / kCacheBlock);
    Page* page = memory_->take();
    std::memcpy(page->data, from, layout_->bytes);
    add(page);
    length_ += kCacheBlock;
}

void KVCache::append_rows(std::span<const NewRows> rows, size_t count) {
    check_whole();
    check_ungrouped();
    memory_->check(missing(count) + copied_first().size());
    prepare(count);
    for (size_t layer = 0; layer < rows.size(); ++layer) {
        const PageLayout::Layer& shape = layout_->layers[layer];
        for (size_t head = 0; head < shape.heads; ++head)
            for (size_t i = 0; i < count; ++i) {
                const size_t from = (head * count + i) * shape.dim;
                put(layer, head, i, rows[layer].keys + from, rows[layer].values + from);
            }
    }
    length_ += count;
}

void KVCache::track_attention() {
    check_ungrouped();
    if (length_)
        throw std::invalid_argument("attention can only be summed from the first position on");
    mass_.clear();
    for (const PageLayout::Layer& layer : layout_->layers) mass_.emplace_back(layer.heads);
    queries_.resize(layout_->layers.size());
}

void KVCache::track_queries(size_t window, size_t size) {
    if (length_)
        throw std::invalid_argument("queries can only be kept from the first position on");
    if (size * sizeof(float) > layout_->bytes)
        throw std::invalid_argument("queries of one layer are larger than a page of the cache");
    keep_query_pages(0);
    query_window_ = window;
    query_floats_ = size;
    queries_.resize(layout_->layers.size());
}

size_t KVCache::query_pages(size_t length) const {
    if (!query_window_) return 0;
    const size_t kept = std::min(length, query_window_) * layout_->layers.size();
    return (kept + queries_per_page() - 1) / queries_per_page();
}

void KVCache::keep_query_pages(size_t pages) {
    for (; query_pages_.size() > pages; query_pages_.pop_back()) memory_->drop(query_pages_.back());
}

void KVCache::keep_queries(size_t count) {
    if (!query_window_) return;
    for (size_t layer = 0; layer < queries_.size(); ++layer) {
        const size_t size = queries_[layer].size;
        for (size_t i = count - std::min(count, query_window_); i < count; ++i)
            std::copy_n(queries_[layer].values.data() + i * size, size,
                        recent(length_ - count + i, layer));
    }
}

std::vector<float> KVCache::recent_queries(size_t layer, size_t size) const {
    const size_t count = std::min(length_, query_window_);
    std::vector<float> queries(count * size);
    for (size_t i = 0; i < count; ++i)
        std::copy_n(recent(length_ - count + i, layer), size, queries.data() + i * size);
    return queries;
}

void KVCache::reserve_queries(size_t layer, size_t nodes, size_t size) {
    queries_[layer].values.resize(nodes * size);
    queries_[layer].size = size;
}

void KVCache::drop_queries() {
    for (Queries& queries : queries_) queries = {};
}

}  // namespace paceline

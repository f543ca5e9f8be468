#include "engine/page_pool.hpp"

#include <algorithm>
#include <string>

namespace paceline {

namespace {

constexpr size_t kLargestSlab = size_t{16} << 20;  // bytes, where a page is smaller than that

}  // namespace

MemoryFull::MemoryFull(size_t needed, size_t free)
    : std::runtime_error(std::to_string(needed) +
                         " more pages of keys and values are needed, free are " +
                         std::to_string(free)) {}

Slab::Slab(size_t count, size_t page_bytes) : data(count * page_bytes), pages(count) {
    free.reserve(count);
    for (size_t i = count; i-- > 0;) {
        pages[i] = {data.bytes() + i * page_bytes, 0, this};
        free.push_back(&pages[i]);
    }
}

PagePool::Count PagePool::count() const {
    std::lock_guard lock(guard_);
    return {used_, shared_, reserved_, limit_};
}

void PagePool::set_limit(size_t pages) {
    std::lock_guard lock(guard_);
    trim(0);
    if (reserved_ > pages)
        throw std::invalid_argument(std::to_string(reserved_) + " pages are in memory, more than " +
                                    std::to_string(pages));
    limit_ = pages;
}

void PagePool::check(size_t pages) const {
    std::lock_guard lock(guard_);
    if (pages > limit_ - used_) throw MemoryFull(pages, limit_ - used_);
}

// The first one, so that the last ones can go back. Slabs double, as far as the limit allows.
Slab& PagePool::slab_with_room() {
    for (const auto& slab : slabs_)
        if (!slab->free.empty()) return *slab;
    const size_t most = std::max<size_t>(kLargestSlab / page_bytes_, 1);
    const size_t requested = std::clamp<size_t>(reserved_, 1, most);
    const size_t count = std::min(requested, limit_ - reserved_);
    if (!count) throw MemoryFull(1, 0);
    slabs_.push_back(std::make_unique<Slab>(count, page_bytes_));
    reserved_ += count;
    return *slabs_.back();
}

Page* PagePool::take() {
    std::lock_guard lock(guard_);
    Slab& slab = slab_with_room();
    Page* page = slab.free.back();
    slab.free.pop_back();
    page->holders = 1;
    ++used_;
    return page;
}

void PagePool::hold(Page* page) {
    std::lock_guard lock(guard_);
    if (++page->holders == 2) ++shared_;
}

void PagePool::drop(Page* page) {
    std::lock_guard lock(guard_);
    if (--page->holders == 1) --shared_;
    if (page->holders) return;
    --used_;
    Slab& slab = *page->slab;
    slab.free.push_back(page);
    if (slab.free.size() == slab.pages.size()) trim(1);
}

uint32_t PagePool::holders(const Page* page) const {
    std::lock_guard lock(guard_);
    return page->holders;
}

// Gives empty slabs back but for `kept`, so that a sequence that comes and goes costs nothing.
void PagePool::trim(size_t kept) {
    std::erase_if(slabs_, [&](const std::unique_ptr<Slab>& slab) {
        if (slab->free.size() < slab->pages.size()) return false;
        if (kept) return --kept, false;
        reserved_ -= slab->pages.size();
        return true;
    });
}

}  // namespace paceline

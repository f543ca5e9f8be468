// The memory of all caches of a model: pages of 64 positions of every layer, which caches share.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "support/buffer.hpp"

namespace paceline {

// More pages are needed than the limit leaves. Nothing has been changed.
struct MemoryFull : std::runtime_error {
    MemoryFull(size_t needed, size_t free);
};

struct Slab;

// One page, and how many caches hold it.
struct Page {
    uint8_t* data;
    uint32_t holders;
    Slab* slab;
};

// Pages that were allocated together, and are freed together.
struct Slab {
    Slab(size_t pages, size_t page_bytes);
    Buffer data;
    std::vector<Page> pages;
    std::vector<Page*> free;
};

// Allocates pages up to a limit, and counts their holders. Thread-safe.
class PagePool {
public:
    struct Count {
        size_t used, shared, reserved, limit;  // pages; those of all slabs; SIZE_MAX: no limit
    };

    explicit PagePool(size_t page_bytes) : page_bytes_(page_bytes) {}

    size_t page_bytes() const { return page_bytes_; }
    Count count() const;
    // Throws std::invalid_argument if more pages than that are in memory.
    void set_limit(size_t pages);

    // Throws MemoryFull unless `pages` can be taken.
    void check(size_t pages) const;
    // A page with one holder. Throws MemoryFull or std::bad_alloc.
    Page* take();
    void hold(Page* page);
    void drop(Page* page);
    uint32_t holders(const Page* page) const;

private:
    Slab& slab_with_room();
    void trim(size_t kept);

    const size_t page_bytes_;
    mutable std::mutex guard_;
    std::vector<std::unique_ptr<Slab>> slabs_;
    size_t used_ = 0, shared_ = 0, reserved_ = 0, limit_ = SIZE_MAX;
};

}  // namespace paceline

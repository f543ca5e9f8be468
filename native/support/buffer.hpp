// Memory for weights, caches and activations: aligned to cache lines, in huge pages where the
// system grants them, so that streaming does not wait for address translation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace paceline {

class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes) {
        if (bytes == 0) return;
        const size_t align = bytes >= kHuge ? kHuge : 64;
        if (bytes > SIZE_MAX - align) throw std::bad_alloc();
        const size_t whole = (bytes + align - 1) / align * align;
        data_ = static_cast<uint8_t*>(std::aligned_alloc(align, whole));
        if (!data_) throw std::bad_alloc();
        size_ = bytes;
#if defined(__linux__)
        if (align == kHuge) madvise(data_, whole, MADV_HUGEPAGE);
#endif
    }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        Buffer taken(std::move(other));
        swap(taken);
        return *this;
    }
    ~Buffer() {
        if (owned_) std::free(data_);
    }

    // A part of another buffer, which stays the owner and has to outlive it.
    static Buffer view(const Buffer& other, size_t offset, size_t bytes) {
        Buffer part;
        part.data_ = other.data_ + offset;
        part.size_ = bytes;
        part.owned_ = false;
        return part;
    }

    // At least `bytes` long; what it held is lost when it grows.
    void reserve(size_t bytes) {
        if (bytes <= size_) return;
        *this = Buffer();
        *this = Buffer(bytes + bytes / 4);
    }
    void zero() { if (size_) std::memset(data_, 0, size_); }

    uint8_t* bytes() const { return data_; }
    float* floats() const { return reinterpret_cast<float*>(data_); }
    size_t size() const { return size_; }
    bool owned() const { return owned_; }
    explicit operator bool() const { return data_ != nullptr; }

private:
    static constexpr size_t kHuge = size_t{2} << 20;
    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(owned_, other.owned_);
    }
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
    bool owned_ = true;
};

}  // namespace paceline

// Caches that round several positions together, as plain data and function pointers.
#pragma once

#include "kernels/kernels.hpp"

namespace paceline {

constexpr size_t kCacheGroup = 32;  // positions, or channels, that share a scale

inline size_t whole_groups(size_t size) {
    return (size + kCacheGroup - 1) / kCacheGroup * kCacheGroup;
}

// A block of the cache as one path of a tree fills it. Positions before the tree's are copied.
struct ClosedBlock {
    size_t block;    // of the path: positions block * 64 and those behind it
    int32_t before;  // the closed block before it on its path, or -1
};

// What attention over such a cache is given besides; of other caches all is null.
struct PackedAttention : Attention {
    // Rows that are not rounded yet, sixteen to a page: those of the open group in two pages, then
    // those of each node.
    const uint8_t* const* open = nullptr;
    // Blocks that paths of a tree fill; null for a chain, whose groups lie in `pages`.
    const ClosedBlock* closed = nullptr;
    const int32_t* closed_of = nullptr;  // [node]: the last one before its own position, or -1
    const uint8_t* closed_data = nullptr;
    size_t closed_stride = 0;
};

// Rounds a group of positions: half `half` of a block.
struct CloseGroup {
    const uint8_t* const* open;  // as in PackedAttention
    size_t offset;
    const int32_t* slots;  // [kCacheGroup]: slot / 16 is a page of `open`
    uint8_t* block;
    size_t half;
};

struct PackedKernels {
    // `put` and `copy` are of rows that are not rounded, sixteen to a page; `attend` is given a
    // PackedAttention; there is no `add_mass`.
    CacheKernels cache;
    size_t (*attention_bytes)(const PackedAttention&, size_t queries);
    void (*close)(const CloseGroup&, size_t head_dim);
    // One row that is not rounded yet, and one that is, as floats.
    void (*read_open)(const uint8_t* rows, size_t place, size_t head_dim, float* key, float* value);
    void (*read_closed)(const uint8_t* block, size_t place, size_t head_dim, float* key,
                        float* value);
};

// How an instruction set keeps keys and values in so many bits, 4 or 3.
const PackedKernels& packed_kernels(const Kernels& kernels, int bits);

}  // namespace paceline

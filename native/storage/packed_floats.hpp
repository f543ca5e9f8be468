// Floating-point numbers without loss in fewer bytes (ZipNN, arXiv 2411.05239).
//
// Numbers of 2 or 4 bytes are taken in chunks. The bits of a number are rotated left by one, so
// that the exponent begins at its highest byte and the sign comes last; then equal bytes of all
// numbers of the chunk form a plane. A plane is stored in one of three ways, told apart by its
// size: as it is (as many bytes as numbers), as one byte that all share, or as a Huffman block. The
// planes follow one another, that of the highest byte first; it is never one shared byte, so that a
// chunk takes at least a bit for each number, and a file cannot ask for memory out of proportion.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace paceline {

constexpr size_t kChunkNumbers = size_t{1} << 18;

struct PackedFloats {
    std::unique_ptr<uint8_t[]> data;
    size_t size = 0;                  // of `data`, in bytes
    std::vector<uint32_t> sizes;      // [chunks, width], of each plane, in bytes
    std::vector<uint64_t> checksums;  // [chunks], of the numbers
};

// Pack `count` numbers of `width` bytes each, on up to `threads` threads.
PackedFloats pack_floats(const uint8_t* numbers, size_t count, size_t width, size_t threads);

// Decode into `numbers`; return the first chunk that is damaged, if one is. `sizes` [chunks, width]
// and `checksums` [chunks] have as many entries as `count` asks for. Any bytes are safe.
std::optional<size_t> unpack_floats(const uint8_t* data, size_t size, const uint32_t* sizes,
                                    const uint64_t* checksums, uint8_t* numbers, size_t count,
                                    size_t width, size_t threads);

// Put `kept` numbers of `width` bytes where the bits of `mask` [(count + 7) / 8] are set, lowest
// first, and zeros elsewhere (the format of Endor). False where as many bits are not set.
bool expand_mask(const uint8_t* mask, const uint8_t* numbers, size_t kept, uint8_t* out,
                 size_t count, size_t width, size_t threads);

}  // namespace paceline

// Huffman codes of bytes, of at most 11 bits, in four streams that are decoded side by side.
//
// A block: 128 bytes with the length of each byte's code (4 bits each, 0 for a byte that does not
// occur), 4 sizes of streams in bytes (uint32, little-endian), the streams. Stream k holds values
// count * k / 4 to count * (k + 1) / 4; its codes are canonical and begin at the lowest bit.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

constexpr size_t kHuffmanStreams = 4;
constexpr size_t kHuffmanHeader = 128 + 4 * kHuffmanStreams;

// Append a block to `out` if it is smaller than the values by a sixteenth; return whether it is.
bool huffman_encode(const uint8_t* values, size_t count, std::vector<uint8_t>& out);

// Decode a block of exactly `count` values; return false where it is no such block. Any bytes are
// safe: nothing outside of `data` is read, nor outside of `out` written.
bool huffman_decode(const uint8_t* data, size_t size, uint8_t* out, size_t count);

}  // namespace paceline

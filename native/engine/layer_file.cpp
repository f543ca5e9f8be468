#include "engine/layer_file.hpp"

#include <algorithm>
#include <cstring>

namespace paceline {

namespace {

size_t aligned(size_t bytes) {
    return (bytes + DirectFile::kAlign - 1) / DirectFile::kAlign * DirectFile::kAlign;
}

// A sum that any changed, missing or exchanged word changes: eight chains of products, so that
// memory is waited for and not the multiplier. `bytes` is a multiple of 64.
uint64_t checksum(const uint8_t* data, size_t bytes) {
    constexpr uint64_t kPrime = 0x9e3779b185ebca87;
    uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (size_t at = 0; at < bytes; at += 64) {
        uint64_t words[8];
        std::memcpy(words, data + at, sizeof(words));
        for (size_t i = 0; i < 8; ++i) {
            lanes[i] = (lanes[i] ^ words[i]) * kPrime;
            lanes[i] ^= lanes[i] >> 29;
        }
    }
    uint64_t sum = bytes;
    for (const uint64_t lane : lanes) sum = ((sum << 13 | sum >> 51) ^ lane) * kPrime;
    return sum;
}

}  // namespace

LayerFile::LayerFile(const std::string& path, size_t entries) : file_(path), entries_(entries) {}

size_t LayerFile::room(std::span<Matrix* const> matrices) {
    size_t bytes = 0;
    for (const Matrix* matrix : matrices) bytes += aligned(matrix->bytes());
    return bytes;
}

void LayerFile::write(size_t entry, std::span<Matrix* const> matrices, size_t size) {
    Entry& to = entries_[entry];
    to = {end_, room(matrices), size, {}};
    const AlignedBuffer piece(std::min(size, to.bytes));
    size_t filled = 0, written = 0;
    const auto flush = [&] {
        file_.write(to.offset + written, piece.bytes(), filled);
        to.sums.push_back(checksum(piece.bytes(), filled));
        written += filled;
        filled = 0;
    };
    for (const Matrix* matrix : matrices) {
        const size_t whole = aligned(matrix->bytes());
        for (size_t at = 0; at < whole;) {
            const size_t count = std::min(whole - at, size - filled);
            const size_t held = at < matrix->bytes() ? std::min(count, matrix->bytes() - at) : 0;
            std::memcpy(piece.bytes() + filled, matrix->data.bytes() + at, held);
            std::memset(piece.bytes() + filled + held, 0, count - held);
            at += count;
            filled += count;
            if (filled == size) flush();
        }
    }
    if (filled) flush();
    end_ += to.bytes;
    size_t place = 0;
    for (Matrix* matrix : matrices) {
        matrix->data = Buffer();
        matrix->streamed = true;
        matrix->entry = entry;
        matrix->place = place;
        place += aligned(matrix->bytes());
    }
}

void LayerFile::read(size_t entry, size_t piece, uint8_t* to) const {
    const Entry& from = entries_[entry];
    const size_t at = piece * from.piece, bytes = std::min(from.piece, from.bytes - at);
    file_.read(from.offset + at, to, bytes);
    if (checksum(to, bytes) != from.sums[piece])
        throw FileError(
            "the weights on disk are not those that were written there; open the model again");
}

AlignedBuffer LayerFile::read(size_t entry) const {
    AlignedBuffer memory(bytes(entry));
    for (size_t piece = 0; piece < pieces(entry); ++piece)
        read(entry, piece, memory.bytes() + piece * entries_[entry].piece);
    return memory;
}

void LayerFile::unpack(const Matrix& matrix, size_t row, float scale, float* out) const {
    const size_t size = entries_[matrix.entry].piece;
    const size_t at = matrix.place + row / kPanel * matrix.panel_bytes;
    const size_t first = at / size, last = (at + matrix.panel_bytes - 1) / size;
    const AlignedBuffer memory((last - first + 1) * size);
    for (size_t piece = first; piece <= last; ++piece)
        read(matrix.entry, piece, memory.bytes() + (piece - first) * size);
    matrix.unpack_panel(memory.bytes() + at - first * size, row % kPanel, scale, out);
}

}  // namespace paceline

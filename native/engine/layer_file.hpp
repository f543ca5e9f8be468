// Matrices of decoder layers in a file, each layer as one run of bytes with checksums.

#pragma once

#include <span>
#include <string>
#include <vector>

#include "engine/matrix.hpp"
#include "support/direct_file.hpp"

namespace paceline {

// Memory whose address suits a direct read.
class AlignedBuffer {
public:
    AlignedBuffer() = default;
    explicit AlignedBuffer(size_t bytes) : memory_(bytes ? bytes + DirectFile::kAlign : 0) {}
    uint8_t* bytes() const {
        const auto at = reinterpret_cast<uintptr_t>(memory_.bytes());
        return reinterpret_cast<uint8_t*>((at + DirectFile::kAlign - 1) / DirectFile::kAlign *
                                          DirectFile::kAlign);
    }

private:
    Buffer memory_;
};

class LayerFile {
public:
    // Bytes that are read at once: of layers, and of single rows.
    static constexpr size_t kPiece = size_t{4} << 20, kRowPiece = size_t{64} << 10;

    // Throws FileError if the file cannot be created; see DirectFile.
    LayerFile(const std::string& path, size_t entries);

    // Bytes that these matrices take behind one another, each at a multiple of DirectFile::kAlign.
    static size_t room(std::span<Matrix* const> matrices);

    // Appends matrices as an entry, in pieces of `piece` bytes; they keep their sizes and places, but
    // no memory. Throws FileError.
    void write(size_t entry, std::span<Matrix* const> matrices, size_t piece = kPiece);

    // Bytes of an entry, 0 if it was not written, and the pieces that it is read in.
    size_t bytes(size_t entry) const { return entries_[entry].bytes; }
    size_t pieces(size_t entry) const { return entries_[entry].sums.size(); }
    // Reads one piece of an entry; several threads may.
    // Throws FileError, also if the bytes are not those that were written.
    void read(size_t entry, size_t piece, uint8_t* to) const;
    // Reads all pieces.
    AlignedBuffer read(size_t entry) const;
    // Row `row` of a matrix in the file times `scale`, in floats. Throws FileError.
    void unpack(const Matrix& matrix, size_t row, float scale, float* out) const;

    int descriptor() const { return file_.descriptor(); }

private:
    struct Entry {
        size_t offset = 0, bytes = 0, piece = kPiece;
        std::vector<uint64_t> sums;  // of each piece
    };
    DirectFile file_;
    std::vector<Entry> entries_;
    size_t end_ = 0;  // of what was written
};

}  // namespace paceline

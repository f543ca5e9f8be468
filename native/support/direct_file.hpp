// A file that is read and written past the page cache, where the file system lets it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace paceline {

// A file that cannot be created, written or read, in one sentence.
struct FileError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class DirectFile {
public:
    static constexpr size_t kAlign = 4096;  // of offsets, addresses and sizes

    // Creates `path`, which must not exist, for this user only, and removes its name at once: the
    // system frees the bytes when the file is closed, however the process ends.
    // Throws FileError.
    explicit DirectFile(const std::string& path);
    ~DirectFile();
    DirectFile(const DirectFile&) = delete;
    DirectFile& operator=(const DirectFile&) = delete;

    // Throws FileError: the disk is full, or fails.
    void write(size_t offset, const uint8_t* from, size_t bytes);
    // Reads exactly `bytes`; several threads may. Throws FileError: the file is shorter, or the disk
    // fails.
    void read(size_t offset, uint8_t* to, size_t bytes) const;

    // Whether the page cache is passed by; if not, its pages are dropped after each call.
    bool direct() const { return direct_; }
    int descriptor() const { return descriptor_; }

private:
    std::string path_;
    int descriptor_ = -1;
    bool direct_ = false;
};

}  // namespace paceline

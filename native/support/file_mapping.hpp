// Memory that shows a file.

#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

struct AddressRange {
    uintptr_t begin = 0, end = 0;
};

// Whether every byte of a range shows a file and cannot be written, so that the system may drop its
// pages and read them again. False where that is not known. `known` is a range that was found to be
// so, which is not looked up again while its file stays mapped; it becomes the mapping around this
// range if that is one.
bool is_read_only_file(const void* begin, size_t bytes, AddressRange& known);

// Gives the pages of such a range back to the system.
void forget_pages(const void* begin, size_t bytes);

}  // namespace paceline

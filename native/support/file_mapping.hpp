// Whether memory shows a file.

#pragma once

#include <cstddef>

namespace paceline {

// Whether every byte of a range shows a file and cannot be written, so that the system may drop its
// pages and read them again. False where that is not known.
bool is_read_only_file(const void* begin, size_t bytes);

}  // namespace paceline

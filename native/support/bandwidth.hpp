// How fast this machine reads memory: the ceiling of plain decoding.

#pragma once

#include <cstddef>

namespace paceline {

// Bytes per second of the median of `repeats` reads of one buffer by `threads` threads.
double read_bandwidth(size_t threads, size_t megabytes, size_t repeats);

}  // namespace paceline

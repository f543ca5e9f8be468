// What `group` of a format says where it holds the weights that are not zero, and a bitmap of them:
// how many blocks share a scale and, in the upper half, how many bytes of weights a panel has room for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

constexpr int kRoomShift = 32;

inline size_t scale_blocks(size_t group) { return group & 0xffffffff; }
inline size_t weight_room(size_t group) { return static_cast<uint64_t>(group) >> kRoomShift; }

}  // namespace paceline

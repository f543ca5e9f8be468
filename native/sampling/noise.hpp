// Random bits of a stream and a token; `paceline.noise.bits` is the same.

#pragma once

#include <cstdint>

namespace paceline {

inline uint64_t random_bits(uint64_t start, uint64_t token) {
    uint64_t x = start + (token + 1) * 0x9e3779b97f4a7c15ULL;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

}  // namespace paceline

// The noise of a draw: random bits of a stream and a token, as in `paceline.noise`.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

// 64 random bits of `token` in the stream that begins at `start`; equal to `paceline.noise.bits`.
inline uint64_t random_bits(uint64_t start, uint64_t token) {
    uint64_t x = start + (token + 1) * 0x9e3779b97f4a7c15ULL;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ x >> 27) * 0x94d049bb133111ebULL;
    return x ^ x >> 31;
}

// The noise of `token` in the stream that begins at `start`.
double exact_noise(uint64_t start, uint64_t token);

// The tokens, ascending, one of which has the largest logit + Gumbel noise: all others are ruled
// out by a bound on their noise that takes no logarithm. NaN logits are never among them.
std::vector<int32_t> contenders(const float* logits, size_t size, uint64_t start);

}  // namespace paceline

// Tournament sampling over a whole distribution; the Python reference is `watermarks/synthid.py`.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

// The distribution after `layers` layers of a two-candidate tournament, from probabilities [size].
// Bit `layer` of `random_bits(start, token)` is the token's score in that layer.
std::vector<float> tournament(const float* probs, size_t size, uint64_t start, int layers);

}  // namespace paceline

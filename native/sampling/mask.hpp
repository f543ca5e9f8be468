// What a grammar's bits leave of logits.

#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

// out = in, -inf where `bits` has 0, lowest bit first.
void mask(const float* in, const uint32_t* bits, size_t size, float* out);

}  // namespace paceline

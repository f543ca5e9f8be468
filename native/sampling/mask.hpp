// Grammar masks: which tokens may come next, as bits.

#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

// Copy `size` logits from `in` to `out`, with -inf where `bits` has 0. Token i is bit i % 32 of
// word i / 32, so `bits` holds at least (size + 31) / 32 words.
void mask_logits(const float* in, const uint32_t* bits, size_t size, float* out);

}  // namespace paceline

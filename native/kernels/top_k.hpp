// The k most likely tokens of one row of logits, best first, of equal ones the lower, and their
// softmax probabilities [k] within 3e-4 of themselves, 1 <= k <= size. Where fewer than k logits are numbers, or one of the
// best is infinite, the probabilities are not numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

using TopRow = void (*)(const float* row, size_t size, size_t k, int32_t* tokens, float* probs);

// The function of an instruction set that `runnable` lists.
TopRow top_row(const char* isa);

}  // namespace paceline

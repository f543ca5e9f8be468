// The k most likely tokens of one row of logits, best first, of equal ones the lower, and their
// softmax probabilities [k], 1 <= k <= size; of more than 4096 logits within 3e-4 of themselves.
// Where fewer than k logits are numbers, or the best is infinite, all probabilities are 1 / size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

using TopRow = void (*)(const float* row, size_t size, size_t k, int32_t* tokens, float* probs);

// The function of an instruction set that `runnable` lists.
TopRow top_row(const char* isa);

}  // namespace paceline

// The k most likely tokens of rows of logits.

#pragma once

#include <cstddef>
#include <cstdint>

namespace paceline {

// For each of `rows` rows of logits [rows, vocabulary] the k most likely tokens [rows, k], best
// first and of equal ones the lower token, with their softmax probabilities [rows, k]; see
// kernels/top_k.hpp. `masks` is null or [rows, mask_words] as `mask_logits` reads them.
void top_k(const float* logits, size_t rows, size_t vocabulary, size_t k, const uint32_t* masks,
           size_t mask_words, int32_t* tokens, float* probs);

}  // namespace paceline

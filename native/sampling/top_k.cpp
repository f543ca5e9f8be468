#include "sampling/top_k.hpp"

#include <vector>

#include "kernels/isa.hpp"
#include "sampling/mask.hpp"

namespace paceline {

void top_k(const float* logits, size_t rows, size_t vocabulary, size_t k, const uint32_t* masks,
           size_t mask_words, int32_t* tokens, float* probs) {
    const Kernels& kernels = choose("");
    std::vector<float> masked(masks ? vocabulary : 0);
    for (size_t row = 0; row < rows; ++row) {
        const float* values = logits + row * vocabulary;
        if (masks) {
            mask_logits(values, masks + row * mask_words, vocabulary, masked.data());
            values = masked.data();
        }
        kernels.top(values, vocabulary, k, tokens + row * k, probs + row * k);
    }
}

}  // namespace paceline

#include "sampling/top_k.hpp"

#include <string_view>
#include <vector>

#include "kernels/isa.hpp"
#include "kernels/top_k.hpp"
#include "sampling/mask.hpp"

namespace paceline {

extern const TopRow top_portable;
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
extern const TopRow top_avx2, top_avxvnni, top_avx512, top_avx512vnni;
#elif defined(__aarch64__)
extern const TopRow top_neon, top_neondot, top_neoni8mm;
#endif

TopRow top_row(const char* name) {
    const std::string_view isa = name;
#if defined(PACELINE_PORTABLE_ONLY)
#elif defined(__x86_64__)
    if (isa == "avx512vnni") return top_avx512vnni;
    if (isa == "avx512") return top_avx512;
    if (isa == "avxvnni") return top_avxvnni;
    if (isa == "avx2") return top_avx2;
#elif defined(__aarch64__)
    if (isa == "neoni8mm") return top_neoni8mm;
    if (isa == "neondot") return top_neondot;
    if (isa == "neon") return top_neon;
#endif
    return top_portable;
}

void top_k(const float* logits, size_t rows, size_t vocabulary, size_t k, const uint32_t* masks,
           size_t mask_words, int32_t* tokens, float* probs) {
    const TopRow top = top_row(choose("").isa);
    std::vector<float> masked(masks ? vocabulary : 0);
    for (size_t row = 0; row < rows; ++row) {
        const float* values = logits + row * vocabulary;
        if (masks) {
            mask_logits(values, masks + row * mask_words, vocabulary, masked.data());
            values = masked.data();
        }
        top(values, vocabulary, k, tokens + row * k, probs + row * k);
    }
}

}  // namespace paceline

#include "sampling/noise.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace paceline {

namespace {

constexpr double kLog2 = 0.6931471805599453, kRounding = 1e-4;

// An upper bound of the noise -log(-log(u)) with u = (m + 0.5) / 2^53. As -log(u) >= 1 - u, it is
// at most -log(1 - u) <= (54 - log2(2^53 - m)) * log(2), whose whole part is a count of zero bits.
double noise_bound(uint64_t m) {
    const uint64_t rest = (uint64_t{1} << 53) - m;
    return (54 - (63 - std::countl_zero(rest))) * kLog2;
}

double exact_noise(uint64_t m) {
    return -std::log(-std::log((static_cast<double>(m) + 0.5) * 0x1p-53));
}

}  // namespace

double exact_noise(uint64_t start, uint64_t token) {
    return exact_noise(random_bits(start, token) >> 11);
}

std::vector<int32_t> contenders(const float* logits, size_t size, uint64_t start) {
    struct Token {
        int32_t id;
        double bound;
    };
    std::vector<Token> possible;
    double best = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < size; ++i) {
        const uint64_t m = random_bits(start, i) >> 11;
        const double bound = static_cast<double>(logits[i]) + noise_bound(m);
        if (!(bound >= best)) continue;
        best = std::max(best, static_cast<double>(logits[i]) + exact_noise(m) - kRounding);
        possible.push_back({static_cast<int32_t>(i), bound});
    }
    std::vector<int32_t> tokens;
    for (const Token& token : possible)
        if (token.bound >= best) tokens.push_back(token.id);
    return tokens;
}

}  // namespace paceline

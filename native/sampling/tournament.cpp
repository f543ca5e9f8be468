#include "sampling/tournament.hpp"

#include <algorithm>
#include <array>
#include <bit>

#include "sampling/noise.hpp"

namespace paceline {

namespace {

constexpr float kSmallest = 1e-30f;  // smaller probabilities become 0
constexpr size_t kLanes = 32;  // partial sums side by side; the reference adds in the same order

using Lanes = std::array<float, kLanes>;

// Bit `place` chooses; by masks instead of branches, which vector units of every kind can do.
float select(uint32_t bits, int place, float yes, float no) {
    const uint32_t mask = -(bits >> place & 1);
    const auto a = std::bit_cast<uint32_t>(yes), b = std::bit_cast<uint32_t>(no);
    return std::bit_cast<float>((a & mask) | (b & ~mask));
}

// Add to each lane the probability of its tokens whose bit is 1.
void add_set(Lanes& sums, const float* p, const uint32_t* bits, int place) {
    for (size_t i = 0; i < kLanes; ++i) sums[i] += select(bits[i], place, p[i], 0.0f);
}

void play(float* p, const uint32_t* bits, int place, float won, float lost) {
    for (size_t i = 0; i < kLanes; ++i) {
        const float prob = p[i] * select(bits[i], place, won, lost);
        p[i] = prob < kSmallest ? 0.0f : prob;
    }
}

}  // namespace

std::vector<float> tournament(const float* probs, size_t size, uint64_t start, int layers) {
    std::vector<uint32_t> tokens;
    for (size_t token = 0; token < size; ++token)
        if (probs[token]) tokens.push_back(static_cast<uint32_t>(token));
    const size_t n = tokens.size(), padded = (n + kLanes - 1) / kLanes * kLanes;
    std::vector<float> p(padded), out(size);
    std::vector<uint32_t> bits(padded);
    for (size_t i = 0; i < n; ++i) p[i] = probs[tokens[i]];
    Lanes sums{};
    for (int layer = 0; layer < layers; ++layer) {
        const int place = layer % 32;
        if (place == 0) {
            for (size_t i = 0; i < n; ++i)
                bits[i] = static_cast<uint32_t>(random_bits(start, tokens[i]) >> layer);
            sums = {};
            for (size_t i = 0; i < padded; i += kLanes) add_set(sums, &p[i], &bits[i], 0);
        }
        double total = 0.0;
        for (const float sum : sums) total += sum;
        const double rest = 1.0 - std::min(total, 1.0);
        const auto won = static_cast<float>(1.0 + rest), lost = static_cast<float>(rest);
        sums = {};
        for (size_t i = 0; i < padded; i += kLanes) {
            play(&p[i], &bits[i], place, won, lost);
            add_set(sums, &p[i], &bits[i], (place + 1) % 32);  // for the next layer
        }
    }
    for (size_t i = 0; i < n; ++i) out[tokens[i]] = p[i];
    return out;
}

}  // namespace paceline

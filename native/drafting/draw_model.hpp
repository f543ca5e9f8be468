// Adjusts predicted probabilities by what is known about the next draws: the tokens that a control
// allows, and the noise of the walk.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "drafting/successor_table.hpp"

namespace paceline {

// The walk draws the token with the largest log probability + noise, and its noise is a function of
// seed, position and token. So, given candidates with probabilities p(t) and the probability r that
// they leave to all other tokens, the probability that t is drawn is the softmax of
//
//     a * log p(t) + b * noise(t)     and     c * log r + d     for another token
//
// where a, b, c, d follow the gradient of the log probability of what was drawn. Without noise the
// probabilities stay as they are. Where only some tokens are allowed, those share the probability
// of the others; where at most `kMaxListed` are allowed, the ones that no source predicts share
// what is left over. A copy serves another text at the same time; copies share what they learn.
class DrawModel {
public:
    // Begin a tree. `noise` holds where the noise of the draws below each depth starts; it is empty
    // without noise.
    void start(std::vector<uint64_t> noise);

    // Adjust the candidates of a node; nodes come in order. `allowed` holds a bit for each token;
    // if it is empty, all are allowed.
    void adjust(const DraftTree& tree, size_t node, std::span<const uint32_t> allowed,
                std::vector<Candidate>& successors);

    // Learn from the tokens that were drawn from the root of that tree on. Can be called once for
    // each tree.
    void learn(const int32_t* drawn, size_t count);

    void reset() { *weights = kStart; }

    using Weights = std::array<float, 4>;  // a, b, c, d
    static constexpr Weights kStart{1.0f, 1.0f, 1.0f, 0.5772f};
    std::shared_ptr<Weights> weights = std::make_shared<Weights>(kStart);

private:
    static constexpr float kRate = 0.01f, kMinProb = 1e-6f, kMaxWeight = 8.0f, kMaxSlope = 2.0f;
    static constexpr size_t kMaxListed = 32;  // allowed tokens, up to which all become candidates

    struct Outcome {
        int32_t token;
        float log, noise, prob;
    };
    struct Node {
        size_t parent, depth;
        int32_t token;
        size_t first = 0, last = 0;  // of `outcomes_`: its candidates and another token
    };

    static void allow(std::span<const uint32_t> allowed, std::vector<Candidate>& successors);
    void apply_noise(Node& node, std::vector<Candidate>& successors);
    void learn(const Node& node, int32_t drawn);

    std::vector<uint64_t> noise_;  // by depth
    std::vector<Node> nodes_;
    std::vector<Outcome> outcomes_;
};

}  // namespace paceline

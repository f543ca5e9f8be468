// What is known of the next draws beyond probabilities: the tokens that a control allows, and the noise.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "drafting/successor_table.hpp"

namespace paceline {

// The walk draws the token with the largest log probability + noise, and its noise is a function of the
// seed, the position and the token. So of successors with the probabilities p(t), and with what they leave
// over, r, for all others, the probability that t is drawn is the softmax of
//
//     a * log p(t) + b * noise(t)     and     c * log r + d     for another one
//
// where a, b, c, d follow the gradient of the log probability of what was drawn. Without noise the
// probabilities stay. Where only some tokens are allowed, they share what the others had; where these are
// few, those that nobody names share what is left over. A copy is for another text at the same time;
// both learn from both.
class DrawModel {
public:
    // A tree grows; where the noise of the draws below each depth starts, empty without noise.
    void start(std::vector<uint64_t> noise);

    // The successors of a node, of all nodes in order. `allowed`, a bit for each token, may be
    // empty: then all are.
    void look(const DraftTree& tree, size_t node, std::span<const uint32_t> allowed,
              std::vector<Candidate>& successors);

    // What was drawn from the root of that tree on. Learns once.
    void learn(const int32_t* drawn, size_t count);

    void reset() { *weights = kStart; }

    using Weights = std::array<float, 4>;  // a, b, c, d
    static constexpr Weights kStart{1.0f, 1.0f, 1.0f, 0.5772f};
    std::shared_ptr<Weights> weights = std::make_shared<Weights>(kStart);

private:
    static constexpr float kRate = 0.01f, kLeast = 1e-6f, kLargest = 8.0f, kSteepest = 2.0f;
    static constexpr size_t kFew = 32;  // allowed tokens that are all guessed

    struct Seen {
        int32_t token;
        float log, noise, prob;
    };
    struct Node {
        size_t parent, depth;
        int32_t token;
        size_t first = 0, last = 0;  // of `seen_`: its successors and another one
    };

    static void allow(std::span<const uint32_t> allowed, std::vector<Candidate>& successors);
    void judge(Node& node, std::vector<Candidate>& successors);
    void learn(const Node& node, int32_t drawn);

    std::vector<uint64_t> noise_;  // by depth
    std::vector<Node> nodes_;
    std::vector<Seen> seen_;
};

}  // namespace paceline

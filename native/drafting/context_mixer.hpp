// Guesses from what the model said after like contexts: its distributions, kept for each context
// of several lengths, and mixed with weights that learn from what was drawn.

#pragma once

#include <array>

#include "drafting/successor_table.hpp"

namespace paceline {

// The contexts are, from the vaguest to the most exact: the empty one; the one token that lies
// `skips + 1`, ..., 2 back; the last 1, 2, ..., `orders` tokens.
//
// Of the distributions p_c found for a position, the probability of token t is the softmax of
//
//     sum over c of   w_c * log(1 + p_c(t) / kFloor)  +  v_c * [t is c's likeliest]
//
// over all tokens that some p_c names and "another one", which has what the p_c leave over and a
// bias. So a row that does not know t adds nothing. The weights are looked up by the most exact
// context that is known, by c, and by how often c was observed; each drawn token moves them along
// the gradient of its log probability. So greedy output sharpens the probabilities, and sampled does not.
//
// Predictions from elsewhere are further p_c in the same sum. Their weights are looked up by the most
// exact context that is known and by the voice's kind, one of `kinds`.
class ContextMixer {
public:
    ContextMixer(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
          size_t kinds = 0);

    // Append the successors of a context, `last` newest first, with their probabilities.
    void successors(const int32_t* last, const Predictions& predictions, std::vector<Candidate>& out);

    // The successors' weights learn that `drawn` came next.
    void learn(const int32_t* last, const Predictions& predictions, int32_t drawn);

    // The model's likeliest successors of a context, with their probabilities [n].
    void observe(const int32_t* last, const int32_t* top, const float* p, size_t n);

    void reset();

    size_t width() const { return std::max(orders_, skips_ + 1); }

    // As `grow` asks.
    void start() {}
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out) {
        successors(tree.last(node), {}, out);
    }

    static constexpr size_t kOrigins = 16;  // the contexts are the first

    SuccessorTable table;
    std::vector<float> weights;  // [contexts + 1, contexts, kBuckets, 2], then [.., kinds, 2]
    std::vector<float> biases;   // [contexts + 1]

private:
    static constexpr size_t kBuckets = 4;   // observations: 1, 2-3, 4-9, more
    static constexpr size_t kMost = 32;     // candidates of one position
    static constexpr size_t kSlots = 128;   // power of two, well above kMost
    static constexpr float kFloor = 0.002f;

    // What one context or voice adds: evidence `first` to `last`, and for another one.
    struct Source {
        size_t weight;  // index of w; v follows it
        size_t first, last;
        bool leads;  // the evidence begins with its likeliest
        float rest;
    };

    void find_keys(const int32_t* last);
    uint64_t key(const int32_t* last, size_t context) const;
    size_t candidate(int32_t token);
    void mix(const int32_t* last, const Predictions& predictions);
    void add(const Successor* successors, size_t count, size_t weight, int16_t origin);
    void normalise();
    int16_t loudest(size_t candidate) const;

    size_t orders_, skips_, contexts_, kinds_;
    float keep_, rate_;

    // The position mixed last.
    size_t set_ = 0, known_ = 0, count_ = 0;  // weights, contexts, candidates
    std::array<int32_t, kMost> tokens_{};
    std::array<float, kMost + 1> probs_{};
    std::array<uint32_t, kMost> named_{};
    std::array<std::array<float, kOrigins>, kMost> said_{};  // what each origin added
    std::vector<uint64_t> keys_;  // of each context; 0 where the text is too short
    std::vector<Source> sources_;
    std::vector<uint8_t> candidates_;   // of each piece of evidence
    std::vector<float> likelihoods_;
    std::array<uint8_t, kSlots> slots_{};  // candidates by hash, plus 1
};

}  // namespace paceline

// Predicts the next token from the model's own distributions in earlier, similar contexts: a table
// keeps them for contexts of several lengths, and weights learned online mix them.

#pragma once

#include <array>

#include "drafting/successor_table.hpp"

namespace paceline {

// Contexts, from the least to the most specific: the empty one; the single token that lies `skips +
// 1`, ..., 2 positions back; the last 1, 2, ..., `orders` tokens.
//
// Given the distributions p_c that are known at a position, the probability of token t is the
// softmax of
//
//     sum over c of   w_c * log(1 + p_c(t) / floor)  +  v_c * [t is the most likely token of c]
//
// over all tokens that some p_c lists, and "another token", whose p_c(t) is what p_c leaves over
// and which has a bias. A row without token t contributes nothing. The weights depend on the most
// specific known context, on c, and on how often c was observed; every drawn token moves them along
// the gradient of its log probability. So greedy output sharpens the probabilities, and sampled
// output does not.
//
// Predictions of other sources are further p_c in the same sum. Their weights depend on the most
// specific known context and on the prediction's kind, one of `kinds`.
class ContextMixer {
public:
    ContextMixer(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
                 size_t kinds = 0, float floor = 0.002f);

    // Append the candidates that may follow a context; `last` holds its tokens, newest first.
    void successors(const int32_t* last, const Predictions& predictions,
                    std::vector<Candidate>& out);

    // Fit the weights to the fact that `drawn` came next.
    void learn(const int32_t* last, const Predictions& predictions, int32_t drawn);

    // Store the model's most likely next tokens of a context and their probabilities [n].
    void observe(const int32_t* last, const int32_t* top, const float* p, size_t n);

    void reset();

    size_t width() const { return std::max(orders_, skips_ + 1); }

    // The calls that `grow` makes.
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
    static constexpr size_t kMaxCandidates = 48;  // candidates of one position
    static constexpr size_t kSlots = 128;         // power of two, well above kMaxCandidates

    // What one context or prediction adds to the sum: the likelihoods `first` to `last`, and `rest`
    // for another token.
    struct Term {
        size_t weight;  // index of w; v follows it
        size_t first, last;
        bool has_top;  // the evidence begins with its likeliest
        float rest;
    };

    void find_keys(const int32_t* last);
    uint64_t key(const int32_t* last, size_t context) const;
    size_t candidate(int32_t token);
    void mix(const int32_t* last, const Predictions& predictions);
    void add(const Successor* successors, size_t count, size_t weight, int16_t origin);
    void normalise();
    int16_t main_origin(size_t candidate) const;

    size_t orders_, skips_, contexts_, kinds_;
    float keep_, rate_, floor_;

    // The position mixed last.
    size_t set_ = 0, known_ = 0, count_ = 0;  // weights, contexts, candidates
    std::array<int32_t, kMaxCandidates> tokens_{};
    std::array<float, kMaxCandidates + 1> probs_{};
    std::array<uint32_t, kMaxCandidates> named_by_{};
    std::array<std::array<float, kOrigins>, kMaxCandidates> support_{};  // what each origin added
    std::vector<uint64_t> keys_;  // of each context; 0 where the text is too short
    std::vector<Term> terms_;
    std::vector<uint8_t> candidates_;   // of each piece of evidence
    std::vector<float> likelihoods_;
    std::array<uint8_t, kSlots> slots_{};  // candidates by hash, plus 1
};

}  // namespace paceline

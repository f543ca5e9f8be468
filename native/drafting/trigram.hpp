// Predicts a tree from trigrams of the model's distributions, by Monte Carlo tree search.

#pragma once

#include "drafting/successor_table.hpp"

namespace paceline {

// The table holds the model's most likely next tokens for each pair of tokens. A search of many
// simulations grows the tree: each descends, at every node to the child with the largest
//
//     Q + (c + log((N + kBase + 1) / kBase)) * P * sqrt(N) / (1 + n)
//
// P is the trigram's probability, n the child's visits, N those of all its siblings, and Q the mean
// value of the visits; the simulation ends with a new node. The value of a visit at a child is the
// number of tokens that the branch is expected to add from there on: P + P P' + ..., divided by
// kMean so that it stays near 1.
class TrigramSearch {
public:
    TrigramSearch(size_t k, size_t capacity, float explore, size_t depth, float keep, float rate);

    void propose(DraftTree& tree, size_t budget) const;

    // Store the model's most likely next tokens after two tokens, newest first.
    void observe(const int32_t* last, const int32_t* top, const float* p, size_t n);

    // Fit the reliabilities to the fact that `drawn` came after two tokens.
    void learn(const int32_t* last, int32_t drawn);

    void reset();

    static constexpr size_t kWidth = 2;
    static constexpr size_t kRanks = 4, kProbSteps = 10;  // of reliability

    SuccessorTable table;
    std::vector<float> reliability;  // [kRanks, kChances], probability that a listed token is drawn

private:
    static constexpr float kBase = 19652.0f;
    static constexpr float kMean = 4.0f;

    struct Child {
        Candidate guess;
        size_t kind;
        int32_t node;  // in the tree, or -1
        float visits, value;
    };

    size_t kind(size_t rank, float p) const;
    SuccessorTable::Row row(const int32_t* last) const;
    std::vector<Child> children(const int32_t* last) const;
    Child* choose(std::vector<Child>& among) const;

    float explore_, keep_, rate_;
    size_t depth_;
};

}  // namespace paceline

// Prompt lookup: predicts the next token by what followed the last n tokens earlier in the same
// text.

#pragma once

#include "drafting/successor_table.hpp"

namespace paceline {

// An index of every n-gram of one text, n from `longest` down to 1, with the tokens that followed
// each; recent occurrences weigh more. The longest n-gram that occurred before gets the probability
// that its length has proved to deserve; what it leaves over goes to the next shorter one, without
// the tokens already listed.
class NgramIndex {
public:
    NgramIndex(size_t longest, size_t k, size_t capacity, float keep, float rate);

    // Begin a new text. The old one is forgotten at no cost: its rows are no longer reached.
    void begin();

    // Index the text up to `length`. Tokens from `learn_from` on also teach the reliabilities.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    void successors(const int32_t* last, std::vector<Candidate>& out);

    void reset();

    size_t width() const { return longest_; }

    // The calls that `grow` makes.
    void start() {}
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out) {
        successors(tree.last(node), out);
    }

    std::vector<float> reliability;  // [longest], probability that a match of n + 1 tokens is right

private:
    uint64_t key(const int32_t* last, size_t n) const;
    bool unseen(const std::vector<Candidate>& out, int32_t token) const;
    void learn(const int32_t* last, int32_t token);

    SuccessorTable table_;
    size_t longest_;
    float keep_, rate_;
    uint64_t text_ = 0;
    size_t indexed_ = 0;
    std::vector<int32_t> last_;
    std::vector<Candidate> candidates_;
};

}  // namespace paceline

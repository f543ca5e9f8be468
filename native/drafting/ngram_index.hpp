// Guesses from the text itself: what followed the last n tokens where they stood before.

#pragma once

#include "drafting/successor_table.hpp"

namespace paceline {

// An index of every n-gram of one text, n from `longest` down to 1, and the successors each had,
// the recent weighing more. The longest n-gram that stood before speaks first, with the probability that
// its length proved to deserve; what it leaves over goes to the next shorter, tokens already named
// left out.
class NgramIndex {
public:
    NgramIndex(size_t longest, size_t k, size_t capacity, float keep, float rate);

    // A new text begins. Forgets the old one at no cost: its rows are no longer found.
    void begin();

    // Index the text up to `length`. From `learn_from` on its tokens also teach the reliabilities.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    void successors(const int32_t* last, std::vector<Candidate>& out);

    void reset();

    size_t width() const { return longest_; }

    // As `grow` asks.
    void start() {}
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out) {
        successors(tree.last(node), out);
    }

    std::vector<float> reliability;  // [longest], probability that an n-gram of n+1 tokens names the next

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
    std::vector<Candidate> named_;
};

}  // namespace paceline

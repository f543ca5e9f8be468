// Predicts the next token by what followed the last tokens in a corpus, found with a suffix array.

#pragma once

#include "drafting/successor_table.hpp"

namespace paceline {

// Return the starts of the suffixes of `text` in order. Values are 0..alphabet - 1; a suffix lies
// before the longer ones that begin with it.
//
// By induced sorting (Nong, Zhang and Chan, Two Efficient Algorithms for Linear Time Suffix Array
// Construction, 2011), in linear time.
std::vector<int32_t> suffix_array(const std::vector<int32_t>& text, int32_t alphabet);

// Looks up what followed a context in a corpus of `size` tokens, where a negative token ends a
// document. `suffixes` is its suffix array. Both are only read, and have to outlive the object.
//
// The longest match gets the probability that matches of its length and number of occurrences have
// proved to deserve; what it leaves over goes to a few shorter ones. Of a match with more than
// `samples` occurrences that many are read, evenly spread.
class CorpusMatcher {
public:
    CorpusMatcher(const int32_t* text, const int32_t* suffixes, size_t size, size_t longest,
                  size_t k, size_t samples, float rate);

    void begin() { read_ = 0; }

    // Fit the reliabilities to the tokens of the text from `learn_from` on.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    void propose(DraftTree& tree, size_t budget) const;

    void reset();

    size_t width() const { return longest_; }

    static constexpr size_t kBuckets = 4;  // occurrences: 1, 2-3, 4-15, more

    std::vector<float> reliability;  // [longest, kBuckets], probability that a match is right

private:
    static constexpr size_t kLevels = 3;  // matches used at one position

    // Suffixes `first` to `last` (exclusive) in order, which begin with the same `length` tokens.
    struct Match {
        size_t first, last, length;
    };
    struct Group {
        size_t kind;  // of reliability
        size_t first, last;
    };

    int32_t token(size_t rank, size_t offset) const;
    Match narrow(Match match, int32_t next) const;
    Match find(const int32_t* last, size_t n) const;
    std::vector<Match> matches(const int32_t* last) const;
    void collect(const std::vector<Match>& from, std::vector<Candidate>& out,
                 std::vector<Group>& groups) const;
    void successors(const std::vector<Match>& from, std::vector<Candidate>& out) const;

    const int32_t* text_;
    const int32_t* suffixes_;
    size_t size_, longest_, k_, samples_, read_ = 0;
    float rate_;
};

}  // namespace paceline

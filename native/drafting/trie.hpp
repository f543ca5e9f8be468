// Predicts the next tokens from a trie of every run of `depth` tokens in earlier texts, with
// counts.

#pragma once

#include "drafting/successor_table.hpp"

namespace paceline {

// Node 0 is the root. Each token of a text extends the branches that the last tokens began, so the
// trie holds every string of up to `depth` tokens that was read, and how often it occurred. The
// longest context in the trie gets the probability that such contexts have proved to deserve; what
// it leaves over goes to the next shorter one. When `capacity` nodes are in use, strings seen once
// are dropped and all counts are halved.
class TokenTrie {
public:
    TokenTrie(size_t depth, size_t k, size_t capacity, float here, float rate);

    // Begin a new text; the old ones are kept.
    void begin();

    // Read the text up to `length`. From `learn_from` on its tokens also teach the reliabilities.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    void successors(const int32_t* last, std::vector<Candidate>& out);

    void reset();

    // Replace all nodes but the root by nodes 1..n, fewer than `capacity`. A parent comes before
    // its children, and siblings are distinct.
    void load(const int32_t* tokens, const int32_t* parents, const float* counts, size_t n);

    size_t width() const { return depth_ - 1; }
    size_t capacity() const { return capacity_; }

    static constexpr size_t kBuckets = 4;  // sightings of a context: 1, 2-3, 4-9, more

    std::vector<int32_t> tokens;     // [nodes]
    std::vector<int32_t> parents;    // [nodes], -1 for the root
    std::vector<float> counts;       // [nodes], sightings in all texts, fading
    std::vector<float> reliability;  // [depth - 1, kBuckets], probability that a context is right

private:
    struct Group {
        size_t kind;  // of reliability
        size_t first, last;
    };

    int32_t child(int32_t parent, int32_t token) const;
    int32_t find(const int32_t* last, size_t n) const;
    int32_t add(int32_t parent, int32_t token, float count);
    void clear();
    float weight(int32_t node) const;
    void collect(const int32_t* last, std::vector<Candidate>& out, std::vector<Group>& groups);
    void learn(const int32_t* last, int32_t token);
    void insert(int32_t token);
    void squeeze();
    void keep(const std::vector<bool>& kept);

    size_t depth_, k_, capacity_;
    float here_, rate_;
    uint32_t text_ = 0;
    size_t read_ = 0;
    std::vector<int32_t> first_child_, sibling_;
    std::vector<uint32_t> seen_in_;   // [nodes], the text that counted last in ...
    std::vector<float> seen_;         // [nodes], ... this many sightings
    std::vector<uint32_t> slots_;     // nodes plus 1, by hash of parent and token
    std::vector<int32_t> cursors_;    // [depth], the node of the last d tokens, or -1
    std::vector<int32_t> last_;       // [depth - 1]
    std::vector<Candidate> listed_;
    std::vector<Group> groups_;
};

}  // namespace paceline

// Guesses from the longest match: what followed the end of the text wherever it stood before, in
// this text or in earlier ones.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/successor_table.hpp"

namespace paceline {

// The suffix automaton of several texts, grown token by token (Blumer et al., The smallest
// automaton recognizing the subwords of a text, 1985). A state is a set of strings that stand at
// the same places; it knows how often, and which tokens followed, the latest first.
class SuffixAutomaton {
public:
    SuffixAutomaton() { clear(); }

    // Where a text stands that is being read; several may be read in turns. 0: at its beginning.
    using Reader = int32_t;

    // A string that stands somewhere: the `length` last tokens of what was read.
    struct Match {
        int32_t state = 0;
        uint32_t length = 0;
    };

    // The next token of a text; returns where it stands then.
    Reader push(Reader last, int32_t token);

    void clear();

    // The longest end of the text that stood before, with something after it.
    Match now(Reader last) const;

    // The longest end of a match and one more token that stands somewhere.
    Match advance(Match match, int32_t token) const;

    // The next shorter string that stands at more places; its length is 0 when there is none.
    Match shorter(Match match) const;

    // The latest `most` distinct tokens that followed, with how often each did.
    void successors(int32_t state, size_t most, std::vector<Successor>& out) const;

    size_t size() const { return pushed_; }  // tokens
    size_t bytes() const;

private:
    struct State {
        uint32_t length, count;
        int32_t link, first;  // the next shorter state; the latest edge
    };
    struct Edge {
        int32_t token, to, next, previous;
    };

    static constexpr int kDeep = 64;  // shorter strings beyond these are not counted again

    int32_t add(uint32_t length);
    int32_t find(int32_t state, int32_t token) const;  // an edge, or -1
    size_t slot(int32_t state, int32_t token) const;
    void connect(int32_t state, int32_t token, int32_t to);
    void to_front(int32_t state, int32_t edge);
    int32_t clone(int32_t from, int32_t token, int32_t edge);
    void widen();

    std::vector<State> states_;
    std::vector<Edge> edges_;
    std::vector<int32_t> from_;   // the state of each edge
    std::vector<int32_t> slots_;  // edges by state and token, open addressing; -1 is free
    size_t pushed_ = 0;
};

// The texts that several `SuffixMatcher` share.
struct Texts {
    SuffixAutomaton young, old;
    std::vector<int32_t> read;       // what both have read, -1 between texts
    size_t aged = 0;                 // where in `read` the young one begins
    size_t generation = 0;           // how often a young one grew old, or all was forgotten
    size_t held = 0;                 // trees that are growing: nothing may be forgotten
    const void* writer = nullptr;    // whose text `read` ends with
    std::vector<float> reliability;  // [kKinds], probability that such a match names the next token
};

// Both the latest texts and those before them: when the young automaton has `capacity / 2` tokens
// it grows old, and what was old is forgotten. A copy is for another text at the same time; both
// learn from both.
class SuffixMatcher {
public:
    SuffixMatcher(size_t capacity, size_t k, float rate);

    // A new text begins.
    void begin();

    // Read the text up to `length`. From `learn_from` on its tokens also teach the reliabilities.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    size_t width() const { return 1; }

    // A tree is about to grow from the end of the text.
    void start();

    // The successors of a node of that tree with their probabilities; as `grow` asks.
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out);

    // Forget everything and read again what `read` and `aged` were. A new text comes next.
    void replay(const int32_t* read, size_t count, size_t aged);

    // Throws std::logic_error while a tree grows.
    void reset();

    // While the result lives, a tree grows whose nodes refer to the automata: nothing is forgotten.
    auto hold() const {
        ++texts->held;
        const auto release = [texts = texts](void*) { --texts->held; };
        return std::unique_ptr<void, decltype(release)>(texts.get(), release);
    }

    size_t bytes() const { return texts->young.bytes() + texts->old.bytes(); }

    static constexpr size_t kKinds = 21;  // lengths times counts
    static constexpr size_t kLevels = 4;  // matches of falling length that speak
    static constexpr int16_t kOrigin = 1;  // in a blend

    // The matches at a node, the longest first: the tokens that followed, with their shares.
    void predictions(const DraftTree& tree, size_t node, Predictions& out);

    std::shared_ptr<Texts> texts = std::make_shared<Texts>();

private:
    struct Place {
        SuffixAutomaton::Match young, old;
    };

    Place advance(const Place& place, int32_t token) const;
    void gather(const Place& place, Predictions& out) const;
    void push(int32_t token);
    void age();
    void keep_up();

    size_t capacity_, k_;
    float rate_;
    size_t length_ = 0;  // of the text that was read last
    size_t generation_ = 0;
    SuffixAutomaton::Reader last_ = 0;  // the end of the text in the young automaton
    SuffixAutomaton::Match in_old_;     // and in the old one
    std::vector<Place> places_;
    Predictions found_;
};

}  // namespace paceline

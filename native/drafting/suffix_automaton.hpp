// Predicts the next token by what followed the longest match of the end of the text, in this text
// or in earlier ones.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/successor_table.hpp"

namespace paceline {

// The suffix automaton of several texts, built token by token (Blumer et al., The smallest
// automaton recognizing the subwords of a text, 1985). A state is a set of strings that occur at
// the same places; it knows how often they occur, and which tokens followed, the latest first.
class SuffixAutomaton {
public:
    SuffixAutomaton() { clear(); }

    // The state of a text that is being read; several texts may be read in turn. 0: at the
    // beginning.
    using Reader = int32_t;

    // A string that occurs somewhere: the last `length` tokens of what was read.
    struct Match {
        int32_t state = 0;
        uint32_t length = 0;
    };

    // Read the next token of a text and return its new state.
    Reader push(Reader last, int32_t token);

    void clear();

    // Return the longest end of the text that occurred before and was followed by a token.
    Match now(Reader last) const;

    // Return the longest end of a match plus `token` that occurs somewhere.
    Match advance(Match match, int32_t token) const;

    // Return the next shorter string that occurs at more places; its length is 0 if there is none.
    Match shorter(Match match) const;

    // Append the latest `most` distinct tokens that followed a state, with how often each did.
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

    static constexpr int kMaxLinks =
        64;  // suffix links followed to count a string; shorter ones are not counted

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

// The texts that the copies of a `SuffixMatcher` share.
struct Texts {
    SuffixAutomaton young, old;
    std::vector<int32_t> read;       // the tokens in both automata, -1 between texts
    size_t aged = 0;                 // tokens of `read` that lie in the old automaton
    size_t generation = 0;           // one more after ageing, two more after a reset
    size_t held = 0;                 // trees that are growing: nothing may be forgotten
    const void* writer = nullptr;    // the copy whose text `read` ends with
    std::vector<float> reliability;  // [kKinds], probability that such a match is right
};

// Matches in the latest texts and those before them. When the young automaton holds `capacity / 2`
// tokens it becomes the old one, and the old one is dropped. A copy serves another text at the same
// time; copies share what they learn.
class SuffixMatcher {
public:
    SuffixMatcher(size_t capacity, size_t k, float rate);

    // Begin a new text.
    void begin();

    // Read the text up to `length`. From `learn_from` on its tokens also teach the reliabilities.
    void extend(const int32_t* text, size_t length, size_t learn_from);

    size_t width() const { return 1; }

    // Begin a tree at the end of the text.
    void start();

    // Append the candidates that may follow a node of that tree; called by `grow`.
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out);

    // Forget everything and read again what `read` and `aged` were. A new text begins.
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

    static constexpr size_t kKinds = 21;   // lengths times counts of a match
    static constexpr size_t kLevels = 4;   // matches used at one position
    static constexpr int16_t kOrigin = 1;  // in a blend

    // Append the predictions of the matches at a node, the longest first.
    void predictions(const DraftTree& tree, size_t node, Predictions& out);

    std::shared_ptr<Texts> texts = std::make_shared<Texts>();

private:
    struct Position {
        SuffixAutomaton::Match young, old;
    };

    Position advance(const Position& place, int32_t token) const;
    void gather(const Position& place, Predictions& out) const;
    void push(int32_t token);
    void age();
    void catch_up();

    size_t capacity_, k_;
    float rate_;
    size_t length_ = 0;  // of the text that was read last
    size_t generation_ = 0;
    SuffixAutomaton::Reader last_ = 0;  // the end of the text in the young automaton
    SuffixAutomaton::Match in_old_;     // and in the old one
    std::vector<Position> positions_;
    Predictions predicted_;
};

}  // namespace paceline

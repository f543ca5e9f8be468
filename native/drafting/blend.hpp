// Several sources under one mixture: the model's own distributions, the longest matches, and the
// trees that other drafters propose.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/draw_model.hpp"
#include "drafting/context_mixer.hpp"
#include "drafting/suffix_automaton.hpp"

namespace paceline {

// Origin 0 are the contexts of the mixer, 1 the matches, 2 and on the members. At a node that a
// member's tree holds, too, its children there are one more voice; the kind is the depth. A copy is
// for another text at the same time; both learn from both.
class SourceBlend {
public:
    SourceBlend(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
          size_t reach, size_t follow, size_t members);

    // What a member proposes for the tree that grows next; `certain`: nothing else can follow.
    struct Proposal {
        size_t member;
        bool certain;
        std::vector<int32_t> tokens, parents;
        std::vector<float> scores;
    };

    // The text up to its end is known, and a tree grows from there.
    void start(const int32_t* context, size_t length, std::vector<Proposal> proposals);

    // As `grow` asks.
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out);

    // `drawn` came after a node of the tree that starts where `start` said.
    void learn(const DraftTree& tree, size_t node, int32_t drawn);

    void reset();

    size_t width() const { return mixer->width(); }
    size_t members() const { return members_; }

    std::shared_ptr<ContextMixer> mixer;
    SuffixMatcher suffix;
    DrawModel draw_model;
    std::vector<Proposal> proposals;

private:
    size_t members_;
    static constexpr size_t kDepths = 6;

    const Predictions& predictions(const DraftTree& tree, size_t node);
    void follow(const DraftTree& tree, size_t node);
    int32_t place(size_t node, size_t proposal) const;

    std::vector<int32_t> places_;  // of each node, its place in each proposal, or -1
    std::vector<size_t> depths_;
    Predictions predictions_;
};

}  // namespace paceline

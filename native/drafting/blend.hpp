// Mixes several sources of predictions in one tree: the model's own distributions by context, the
// longest matches in earlier text, and the trees that other drafters propose.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "drafting/draw_model.hpp"
#include "drafting/context_mixer.hpp"
#include "drafting/suffix_automaton.hpp"

namespace paceline {

// Origin 0 is the context mixer, origin 1 the suffix matcher, and origins 2 and up are the members,
// the other drafters. At a node that also exists in a member's tree, its children there are one
// more prediction, whose kind is the depth. So are the model's distributions at the last positions
// of the text, without the tokens drawn from them: what could have come there often comes soon.
// Their kind is the distance to the node; they count as the mixer's. A copy serves another text at
// the same time; copies share what they learn.
class SourceBlend {
public:
    SourceBlend(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
                size_t reach, size_t locate, size_t members);

    // A member's tree. `certain`: no other token can follow its nodes.
    struct Proposal {
        size_t member;
        bool certain;
        std::vector<int32_t> tokens, parents;
        std::vector<float> scores;
    };

    // Begin a tree at the end of `context`, with the members' trees.
    void start(const int32_t* context, size_t length, std::vector<Proposal> proposals);

    // Append the candidates that may follow `node`; called by `grow`.
    void successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out);

    // Learn that `drawn` followed a node of the tree that `start` began.
    void learn(const DraftTree& tree, size_t node, int32_t drawn);

    // Keep the model's most likely tokens [n] at a position of the text, the one before `end`, from
    // which the token at `end` was drawn.
    void keep(size_t end, const int32_t* top, const float* p, size_t n, int32_t drawn);

    // Begin a text.
    void begin();

    void reset();

    size_t width() const { return mixer->width(); }
    size_t members() const { return members_; }

    static constexpr size_t kRecent = 3;  // distributions of the last positions that are kept

    std::shared_ptr<ContextMixer> mixer;
    SuffixMatcher suffix;
    DrawModel draw_model;
    std::vector<Proposal> proposals;

private:
    size_t members_;
    bool has_prior_;
    static constexpr size_t kDepths = 6;
    static constexpr float kFloor = 0.0005f;  // of the mixer

    void add_recent(size_t depth);
    void set_prior();

    const Predictions& predictions(const DraftTree& tree, size_t node);
    void locate(const DraftTree& tree, size_t node);
    int32_t node_in(size_t node, size_t proposal) const;

    std::array<std::vector<Successor>, kRecent> recent_;  // newest first
    size_t recent_end_ = 0;  // the text's length when the newest was drawn from
    size_t length_ = 0;      // of the text at the root
    std::vector<int32_t> nodes_in_;  // [nodes, proposals], the same node in each proposal, or -1
    std::vector<size_t> depths_;
    Predictions predictions_;
};

}  // namespace paceline

#include "drafting/blend.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace paceline {

Blend::Blend(size_t orders, size_t skips, size_t k, size_t capacity, float keep, float rate,
             size_t reach, size_t follow, size_t members)
    : mixer(std::make_shared<Mixer>(orders, skips, k, capacity, keep, rate,
                                    Suffix::kKinds + members * kDepths)),
      // Here the mixer learns what a match is worth.
      suffix(reach, follow, 0.0f) {}

void Blend::reset() {
    mixer->reset();
    suffix.reset();
    foresight.reset();
    proposals.clear();
}

void Blend::start(const int32_t* context, size_t length, std::vector<Proposal> heard) {
    suffix.extend(context, length, std::numeric_limits<size_t>::max());
    suffix.start();
    proposals = std::move(heard);
    places_.assign(proposals.size(), 0);
    depths_.assign(1, 0);
}

int32_t Blend::place(size_t node, size_t proposal) const {
    return places_[node * proposals.size() + proposal];
}

void Blend::follow(const Growth& tree, size_t node) {
    for (size_t next = depths_.size(); next <= node; ++next) {
        const auto parent = static_cast<size_t>(tree.parents[next]);
        for (size_t i = 0; i < proposals.size(); ++i) {
            const Proposal& heard = proposals[i];
            const int32_t above = place(parent, i);
            int32_t found = -1;
            for (size_t at = 1; above >= 0 && at < heard.tokens.size(); ++at)
                if (heard.parents[at] == above && heard.tokens[at] == tree.tokens[next])
                    found = static_cast<int32_t>(at);
            places_.push_back(found);
        }
        depths_.push_back(depths_[parent] + 1);
    }
}

const Voices& Blend::voices(const Growth& tree, size_t node) {
    voices_.clear();
    suffix.voices(tree, node, voices_);
    if (!proposals.empty()) follow(tree, node);
    for (size_t i = 0; i < proposals.size(); ++i) {
        const Proposal& heard = proposals[i];
        const int32_t here = place(node, i);
        if (here < 0) continue;
        const size_t first = voices_.shares.size();
        for (size_t at = 1; at < heard.tokens.size(); ++at)
            if (heard.parents[at] == here)
                voices_.shares.push_back({heard.tokens[at], heard.scores[at]});
        const size_t last = voices_.shares.size();
        if (last == first) continue;
        std::stable_sort(voices_.shares.begin() + static_cast<std::ptrdiff_t>(first),
                         voices_.shares.end(),
                         [](const Share& a, const Share& b) { return a.chance > b.chance; });
        const size_t depth = std::min(depths_[node], kDepths - 1);
        voices_.each.push_back({Suffix::kKinds + heard.member * kDepths + depth, first, last,
                                static_cast<int16_t>(2 + heard.member)});
    }
    return voices_;
}

void Blend::successors(const Growth& tree, size_t node, std::vector<Candidate>& out) {
    const Voices& said = voices(tree, node);
    for (const Proposal& heard : proposals) {
        if (!heard.certain) continue;
        const int32_t here = place(node, static_cast<size_t>(&heard - proposals.data()));
        for (size_t at = 1; here >= 0 && at < heard.tokens.size(); ++at) {
            if (heard.parents[at] != here) continue;
            const auto origin = static_cast<int16_t>(2 + heard.member);
            out.push_back({heard.tokens[at], 1.0f, 1u << origin, origin});
            return;
        }
    }
    mixer->successors(tree.last(node), said, out);
}

void Blend::learn(const Growth& tree, size_t node, int32_t drawn) {
    mixer->learn(tree.last(node), voices(tree, node), drawn);
}

}  // namespace paceline

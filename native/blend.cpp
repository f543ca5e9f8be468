#include "blend.hpp"

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
    places_.assign(1, std::vector<int32_t>(proposals.size(), 0));
    depths_.assign(1, 0);
}

void Blend::follow(const Growth& tree, size_t node) {
    while (places_.size() <= node) {
        const size_t next = places_.size();
        const auto parent = static_cast<size_t>(tree.parents[next]);
        std::vector<int32_t> places(proposals.size(), -1);
        for (size_t i = 0; i < proposals.size(); ++i) {
            const Proposal& heard = proposals[i];
            const int32_t above = places_[parent][i];
            for (size_t at = 1; above >= 0 && at < heard.tokens.size(); ++at)
                if (heard.parents[at] == above && heard.tokens[at] == tree.tokens[next])
                    places[i] = static_cast<int32_t>(at);
        }
        places_.push_back(std::move(places));
        depths_.push_back(depths_[parent] + 1);
    }
}

const Voices& Blend::voices(const Growth& tree, size_t node) {
    follow(tree, node);
    voices_ = suffix.voices(tree, node);
    for (Voice& voice : voices_) voice.origin = 1;
    for (size_t i = 0; i < proposals.size(); ++i) {
        const Proposal& heard = proposals[i];
        const int32_t here = places_[node][i];
        if (here < 0) continue;
        Voice voice;
        voice.origin = static_cast<int16_t>(2 + heard.member);
        voice.kind =
            Suffix::kKinds + heard.member * kDepths + std::min(depths_[node], kDepths - 1);
        for (size_t at = 1; at < heard.tokens.size(); ++at)
            if (heard.parents[at] == here)
                voice.shares.push_back({heard.tokens[at], heard.scores[at]});
        if (voice.shares.empty()) continue;
        std::stable_sort(voice.shares.begin(), voice.shares.end(),
                         [](const Candidate& a, const Candidate& b) { return a.chance > b.chance; });
        voices_.push_back(std::move(voice));
    }
    return voices_;
}

void Blend::successors(const Growth& tree, size_t node, std::vector<Candidate>& out) {
    const Voices& said = voices(tree, node);
    for (const Proposal& heard : proposals) {
        if (!heard.certain) continue;
        const int32_t here = places_[node][static_cast<size_t>(&heard - proposals.data())];
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

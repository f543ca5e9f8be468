#include "drafting/blend.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "drafting/blend_prior.hpp"

namespace paceline {

SourceBlend::SourceBlend(size_t orders, size_t skips, size_t k, size_t capacity, float keep,
                         float rate, size_t reach, size_t locate, size_t members)
    : mixer(std::make_shared<ContextMixer>(orders, skips, k, capacity, keep, rate,
                                           SuffixMatcher::kKinds + kRecent + members * kDepths,
                                           kFloor)),
      // In a blend the mixer learns how reliable matches are: a rate of 0 here.
      suffix(reach, locate, 0.0f),
      members_(members),
      has_prior_(orders == prior::kOrders && skips == prior::kSkips) {
    set_prior();
}

void SourceBlend::reset() {
    suffix.reset();
    mixer->reset();
    set_prior();
    draw_model.reset();
    proposals.clear();
    recent_end_ = 0;
}

// Start the weights of contexts, matches and recent positions where other texts have led them.
void SourceBlend::set_prior() {
    if (!has_prior_) return;
    constexpr size_t sets = std::size(prior::kBiases);
    constexpr size_t contexts = std::size(prior::kContexts) / sets;
    constexpr size_t kinds = std::size(prior::kKinds) / sets;
    static_assert(kinds == 2 * (SuffixMatcher::kKinds + kRecent));
    std::vector<float>& weights = mixer->weights;
    const size_t step = (weights.size() - sets * contexts) / sets;  // members follow in each set
    for (size_t set = 0; set < sets; ++set) {
        mixer->biases[set] = prior::kUnit * static_cast<float>(prior::kBiases[set]);
        for (size_t i = 0; i < contexts; ++i)
            weights[set * contexts + i] =
                prior::kUnit * static_cast<float>(prior::kContexts[set * contexts + i]);
        for (size_t i = 0; i < kinds; ++i)
            weights[sets * contexts + set * step + i] =
                prior::kUnit * static_cast<float>(prior::kKinds[set * kinds + i]);
    }
}

void SourceBlend::begin() {
    suffix.begin();
    recent_end_ = 0;
}

void SourceBlend::keep(size_t end, const int32_t* top, const float* p, size_t n, int32_t drawn) {
    if (end != recent_end_ + 1)
        for (auto& one : recent_) one.clear();
    std::rotate(recent_.begin(), recent_.end() - 1, recent_.end());
    recent_[0].clear();
    for (size_t i = 0; i < n; ++i)
        if (top[i] != drawn) recent_[0].push_back({top[i], p[i]});
    recent_end_ = end;
}

// Predict what the model thought possible at the last positions of the text.
void SourceBlend::add_recent(size_t depth) {
    const size_t behind = length_ + depth - recent_end_;  // positions from the newest to the node
    if (!recent_end_ || length_ <= recent_end_) return;
    for (size_t i = 0; i < kRecent && behind + i <= kRecent; ++i) {
        if (recent_[i].empty()) continue;
        const size_t first = predictions_.successors.size();
        predictions_.successors.insert(predictions_.successors.end(), recent_[i].begin(),
                                       recent_[i].end());
        predictions_.each.push_back({SuffixMatcher::kKinds + behind + i - 1, first,
                                     predictions_.successors.size(), 0});
    }
}

void SourceBlend::start(const int32_t* context, size_t length, std::vector<Proposal> proposal) {
    suffix.extend(context, length, std::numeric_limits<size_t>::max());
    suffix.start();
    length_ = length;
    proposals = std::move(proposal);
    nodes_in_.assign(proposals.size(), 0);
    depths_.assign(1, 0);
}

int32_t SourceBlend::node_in(size_t node, size_t proposal) const {
    return nodes_in_[node * proposals.size() + proposal];
}

void SourceBlend::locate(const DraftTree& tree, size_t node) {
    for (size_t next = depths_.size(); next <= node; ++next) {
        const auto parent = static_cast<size_t>(tree.parents[next]);
        for (size_t i = 0; i < proposals.size(); ++i) {
            const Proposal& proposal = proposals[i];
            const int32_t above = node_in(parent, i);
            int32_t match = -1;
            for (size_t at = 1; above >= 0 && at < proposal.tokens.size(); ++at)
                if (proposal.parents[at] == above && proposal.tokens[at] == tree.tokens[next])
                    match = static_cast<int32_t>(at);
            nodes_in_.push_back(match);
        }
        depths_.push_back(depths_[parent] + 1);
    }
}

const Predictions& SourceBlend::predictions(const DraftTree& tree, size_t node) {
    predictions_.clear();
    suffix.predictions(tree, node, predictions_);
    locate(tree, node);
    add_recent(depths_[node]);
    for (size_t i = 0; i < proposals.size(); ++i) {
        const Proposal& proposal = proposals[i];
        const int32_t here = node_in(node, i);
        if (here < 0) continue;
        const size_t first = predictions_.successors.size();
        for (size_t at = 1; at < proposal.tokens.size(); ++at)
            if (proposal.parents[at] == here)
                predictions_.successors.push_back({proposal.tokens[at], proposal.scores[at]});
        const size_t last = predictions_.successors.size();
        if (last == first) continue;
        std::stable_sort(predictions_.successors.begin() + static_cast<std::ptrdiff_t>(first),
                         predictions_.successors.end(),
                         [](const Successor& a, const Successor& b) { return a.prob > b.prob; });
        const size_t depth = std::min(depths_[node], kDepths - 1);
        predictions_.each.push_back(
            {SuffixMatcher::kKinds + kRecent + proposal.member * kDepths + depth, first, last,
             static_cast<int16_t>(2 + proposal.member)});
    }
    return predictions_;
}

void SourceBlend::successors(const DraftTree& tree, size_t node, std::vector<Candidate>& out) {
    const Predictions& predicted = predictions(tree, node);
    for (const Proposal& proposal : proposals) {
        if (!proposal.certain) continue;
        const int32_t here = node_in(node, static_cast<size_t>(&proposal - proposals.data()));
        for (size_t at = 1; here >= 0 && at < proposal.tokens.size(); ++at) {
            if (proposal.parents[at] != here) continue;
            const auto origin = static_cast<int16_t>(2 + proposal.member);
            out.push_back({proposal.tokens[at], 1.0f, 1u << origin, origin});
            return;
        }
    }
    mixer->successors(tree.last(node), predicted, out);
}

void SourceBlend::learn(const DraftTree& tree, size_t node, int32_t drawn) {
    mixer->learn(tree.last(node), predictions(tree, node), drawn);
}

}  // namespace paceline

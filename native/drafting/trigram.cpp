#include "drafting/trigram.hpp"

#include <cmath>

namespace paceline {

TrigramSearch::TrigramSearch(size_t k, size_t capacity, float explore, size_t depth, float keep,
                             float rate)
    : table(capacity, k), explore_(explore), keep_(keep), rate_(rate), depth_(depth) {
    reset();
}

void TrigramSearch::reset() {
    table.clear();
    reliability.clear();
    // Initially a listed token has the probability that the table gives.
    for (size_t rank = 0; rank < kRanks; ++rank)
        for (size_t i = 0; i < kProbSteps; ++i)
            reliability.push_back((static_cast<float>(i) + 0.5f) / kProbSteps);
}

size_t TrigramSearch::kind(size_t rank, float p) const {
    const auto step = static_cast<size_t>(std::clamp(p, 0.0f, 1.0f) * kProbSteps);
    return std::min(rank, kRanks - 1) * kProbSteps + std::min(step, kProbSteps - 1);
}

SuccessorTable::Row TrigramSearch::row(const int32_t* last) const {
    if (last[1] < 0) return {};
    const uint64_t hash = hashed(hashed(0x9e3779b97f4a7c15ULL, last[1]), last[0]);
    return table.find(hash ? hash : 1);
}

void TrigramSearch::observe(const int32_t* last, const int32_t* top, const float* p, size_t n) {
    if (last[1] < 0) return;
    const uint64_t hash = hashed(hashed(0x9e3779b97f4a7c15ULL, last[1]), last[0]);
    const uint64_t key = hash ? hash : 1;
    table.observe(&key, 1, top, p, n, keep_);
}

void TrigramSearch::learn(const int32_t* last, int32_t drawn) {
    const auto known = row(last);
    for (size_t i = 0; known.count && i < table.k && known.successors[i].token >= 0; ++i) {
        float& prob = reliability[kind(i, known.successors[i].prob)];
        prob += rate_ * ((known.successors[i].token == drawn ? 1.0f : 0.0f) - prob);
    }
}

std::vector<TrigramSearch::Child> TrigramSearch::children(const int32_t* last) const {
    std::vector<Child> listed;
    const auto known = row(last);
    for (size_t i = 0; known.count && i < table.k && known.successors[i].token >= 0; ++i) {
        const Successor& one = known.successors[i];
        listed.push_back({{one.token, one.prob}, kind(i, one.prob), -1, 0.0f, 0.0f});
    }
    return listed;
}

TrigramSearch::Child* TrigramSearch::choose(std::vector<Child>& among) const {
    float visits = 1.0f;
    for (const Child& child : among) visits += child.visits;
    const float weight =
        (explore_ + std::log((visits + kBase + 1.0f) / kBase)) * std::sqrt(visits);
    Child* best = nullptr;
    float most = 0.0f;
    for (Child& child : among) {
        const float worth = child.value + weight * child.guess.prob / (1.0f + child.visits);
        if (!best || worth > most) best = &child, most = worth;
    }
    return best;
}

void TrigramSearch::propose(DraftTree& tree, size_t budget) const {
    std::vector<std::vector<Child>> below{children(tree.last(0))};
    std::vector<Child*> branch;
    // A simulation may end where no trigram is known: such ends must not stop the search.
    for (size_t runs = 0; tree.tokens.size() <= budget && runs < 4 * budget; ++runs) {
        branch.clear();
        int32_t node = 0;
        while (node >= 0 && branch.size() < depth_ && !below[node].empty()) {
            Child* next = choose(below[node]);
            branch.push_back(next);
            const int32_t parent = node;
            node = next->node;
            if (node >= 0) continue;
            next->node = static_cast<int32_t>(tree.tokens.size());
            tree.add(parent, {next->guess.token, reliability[next->kind]});
            below.push_back(children(tree.last(next->node)));
        }
        if (branch.empty()) break;
        float value = 0.0f;
        for (size_t i = branch.size(); i-- > 0;) {
            Child& child = *branch[i];
            value = child.guess.prob * (1.0f + value);
            child.visits += 1.0f;
            child.value += (value / kMean - child.value) / child.visits;
        }
    }
    // Siblings exclude each other, so their probabilities sum to at most 1.
    std::vector<float> sums(tree.tokens.size(), 0.0f);
    for (size_t i = 1; i < tree.tokens.size(); ++i) sums[tree.parents[i]] += tree.scores[i];
    for (size_t i = 1; i < tree.tokens.size(); ++i)
        tree.scores[i] /= std::max(1.0f, sums[tree.parents[i]]);
}

}  // namespace paceline
